"""Write objects in the detection formats."""

import base64

import numpy as np


def thing(box, name, score, vinvl=False):
    if vinvl:
        return {"rect": box, "class": name, "conf": score, "feature": "AAAA", "attributes": []}
    return {"box": box, "class": name, "score": score}


def encode(values, dtype):
    return base64.b64encode(np.array(values, dtype).tobytes()).decode()
