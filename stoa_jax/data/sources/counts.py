"""How many clips each published split has, for `check` to compare with."""

# data set -> split -> clips. WebVid and `folder` have none: links die, and folders are yours.
EXPECTED: dict[str, dict[str, int]] = {
    "msrvtt/captioning": {"train": 6513, "validation": 497, "test": 2990},
    # 9k and 7k are the usual names of lists with 9,000 and 7,010 videos.
    "msrvtt/retrieval": {"train": 9000, "train_7k": 7010, "test": 1000},
    "msrvtt/qa": {"train": 6513, "validation": 497, "test": 2990},
    "msrvtt/multiple_choice": {"test": 2990},
    "msvd/captioning": {"train": 1200, "validation": 100, "test": 670},
    "msvd/retrieval": {"train": 1200, "validation": 100, "test": 670},
    "msvd/qa": {"train": 1200, "validation": 250, "test": 520},
    "lsmdc/retrieval": {"train": 101046, "validation": 7408, "test": 1000},
    "didemo/retrieval": {"train": 8395, "validation": 1065, "test": 1004},
}

# The same of questions, where figures are means over them.
EXPECTED_ITEMS: dict[str, dict[str, int]] = {
    "msrvtt/captioning": {"train": 130260, "validation": 9940, "test": 59800},
    "msrvtt/qa": {"train": 158581, "validation": 12278, "test": 72821},
    "msvd/qa": {"train": 30933, "validation": 6415, "test": 13157},
}
