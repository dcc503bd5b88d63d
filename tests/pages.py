"""Reports as a browser's parser would find them, and texts that would like to be markup."""

import json
import re


HOSTILE = "</script><img src=x onerror=alert(1)> <!-- & \u2028 \u202e ' \" `${1}`"


def embedded(page: str) -> dict:
    """The page's data, as the browser's parser would find it."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def hostile_texts() -> list[dict]:
    """Text, tokens and thoughts that would like to be markup."""
    thought = {"text": HOSTILE, "gain": 0.2, "weight": 0.5, "nll_with": [1.0]}
    tokens = [
        {"piece": HOSTILE, "nll_without": None, "nll_with": None, "thoughts": [thought]},
        {"piece": HOSTILE, "nll_without": 1.2, "nll_with": 1.0, "thoughts": []},
    ]
    return [{"tokens": tokens}]
