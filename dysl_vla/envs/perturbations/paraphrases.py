"""Other words for the instructions of the simulated suites."""

from __future__ import annotations

import re

PHRASES = {
    "pick up": "grab",
    "turn on": "switch on",
    "turn off": "switch off",
    "take": "remove",
    "put": "place",
    "place": "set down",
    "push": "shove",
    "pull": "drag",
    "open": "pull open",
    "close": "shut",
    "move": "bring",
    "press": "push down",
    "insert": "stick",
    "lift": "raise",
    "lock": "bolt",
    "unlock": "unbolt",
    "slide": "shift",
    "sweep": "brush",
    "turn": "rotate",
    "hammer": "knock",
    "kick": "shoot",
    "dunk": "drop",
    "stack": "pile",
    "hang": "hook",
    "wipe": "clean",
}
"""Verbs to others that ask for the same; of two that begin at one word, the longer counts."""
NOUNS = {
    "ball": "sphere",
    "basket": "hamper",
    "bin": "container",
    "bowl": "dish",
    "box": "crate",
    "button": "switch",
    "cabinet": "cupboard",
    "can": "tin",
    "cube": "block",
    "door": "gate",
    "drawer": "tray of the chest",
    "faucet": "tap",
    "goal": "target",
    "hand": "gripper",
    "handle": "grip",
    "hole": "opening",
    "lever": "crank",
    "lid": "cover",
    "mug": "cup",
    "peg": "pin",
    "plate": "saucer",
    "puck": "disc",
    "rack": "holder",
    "ring": "hoop",
    "shelf": "board",
    "stick": "rod",
    "stove": "cooker",
    "table": "desk",
    "wall": "barrier",
    "window": "pane",
    "bottle": "flask",
    "book": "volume",
    "dial": "knob",
    "tool": "instrument",
    "nut": "washer",
}


def paraphrase(text: str, level: int) -> str:
    """Put an instruction in other words.

    Args:
        text: The instruction.
        level: 1: with a polite word; 2: with another verb; 3: with other nouns, too; 4: that as a question; 5: that
            within a longer text.
    """
    if level == 1:
        return f"please {text}"
    changed = _replaced(text, PHRASES)
    if changed == text:
        changed = f"now {text}"  # of a suite whose verbs are not known here
    if level >= 3:
        changed = _replaced(changed, NOUNS)
    if level == 4:
        return f"could you {changed} for me"
    if level == 5:
        return f"the others come home soon, so it would be nice if you could {changed} before that"
    return changed


def _replaced(text: str, words: dict[str, str]) -> str:
    """Replace whole words, each once: what was put in is not replaced again."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.sub(rf"\b({'|'.join(longest_first)})\b", lambda found: words[found[1]], text)
