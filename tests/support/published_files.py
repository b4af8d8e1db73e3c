"""Small annotation files in their published form, for several test modules."""

import json


def put(directory, **contents):
    """Write files by name (`__` for a dot, `___` for a slash) from text, bytes or JSON."""
    for name, content in contents.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content))


def rows(source):
    return {s: [(e.video_id, list(e.texts)) for e in v] for s, v in source.splits.items()}


def named(source):
    return [(s.video, s.line) for s in source.skipped]


WEBVID = (
    "videoid,name,page_idx,page_dir,duration,contentUrl\n"
    '1066674784,"Cat, the ""king"", sleeps",1,000001_000050,PT00H00M05S,http://example.invalid/1\n'
    "0021,Plain words,2,012851_012900,PT00H00M09S,http://example.invalid/2\n"
    '33,"Two\nlines",3,000101_000150,PT,u\n'
)


def msrvtt_data(*numbers):
    sentences = [
        {"caption": f"caption {j} of {n}", "video_id": f"video{n}", "sen_id": 1000 * n - j}
        for n in numbers
        for j in range(3)
    ]
    videos = [{"video_id": f"video{n}", "split": "train"} for n in numbers]
    return {"info": {}, "videos": videos, "sentences": sentences}


QA = [
    {"category_id": 1, "video_id": 5, "question": "what is it?", "id": 1, "answer": "Cat"},
    {"category_id": 1, "video_id": 9, "question": "who?", "id": 2, "answer": "man"},
    {"category_id": 1, "video_id": 5, "question": "doing what?", "id": 3, "answer": "sleep"},
]

NAMES = ["-4wsuPCjDBc_5_15", "vid_b_0_9", "no caption_1_2"]

CAPTIONS = {
    NAMES[0]: [["a", "squirrel", "eats"], ["it", "eats", "a", "nut"]],
    NAMES[1]: [["a", "man", "runs"]],
}
