"""From generated text to an answer, by two protocols.

``strict`` takes an answer that is as a word or an option of its own; ``paper`` is the authors' substring rules.
Every function gives None where the text has no answer ("unparsable").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# <|im_end|>, <|eot_id|>, </s>, <pad>, <end_of_turn>, [PAD]; not <answer>, <event> and <range>, which are answers.
_SPECIAL = re.compile(
    r"<\|[^<>|]*\|>|</?s>|<(?:pad|unk|bos|eos|start_of_turn|end_of_turn)>|\[(?:PAD|UNK|CLS|SEP)\]", re.IGNORECASE
)
LETTERS = "ABCDE"
# Words that follow the letter A and no article.
_AFTER = "(?:and|or|but|is|was|because|since|as|which)"


def clean(text: str) -> str:
    """The text without the special tokens of common tokenizers, and without space around it."""
    return _SPECIAL.sub(" ", text).strip()


def tagged(text: str, tag: str) -> list[str]:
    """Return what every ``<tag>...</tag>`` has, each from its opening to the next closing."""
    found = []
    start = text.find(f"<{tag}>")
    while start >= 0 and (end := text.find(f"</{tag}>", start)) >= 0:
        found.append(text[start + len(tag) + 2 : end])
        start = text.find(f"<{tag}>", end)
    return found


def answer_text(text: str) -> str:
    """The cleaned text, or what its last ``<answer>`` element has where it has one."""
    text = clean(text)
    return (tagged(text, "answer") or [text])[-1].strip()


def plain(text: str) -> str:
    """Lower case; everything but letters, digits and apostrophes is one space: for comparing words."""
    return " ".join(re.sub(r"[^\w']|_|(?<!\w)'|'(?!\w)", " ", text.casefold()).split())


def yes_no(text: str) -> str | None:
    """``strict``: "yes" or "no" as a separate word, in any case, any number of times, and not both.

    A part of a hyphenated word ("no-one") is no word of its own.
    """
    found = {word.lower() for word in re.findall(r"(?<![\w-])(?:yes|no)(?![\w-])", answer_text(text), re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None


def yes_else_no(text: str) -> str:
    """``paper``, MME: "yes" anywhere in the lower-cased text, else "no"."""
    return "yes" if "yes" in text.lower() else "no"


def yes_then_no(text: str) -> str | None:
    """``paper``, POPE: "yes" anywhere, else "no" anywhere ("not", "know"), else unparsable."""
    return next((word for word in ("yes", "no") if word in text.lower()), None)


def letter_anywhere(text: str) -> str | None:
    """``paper``: the first of "a ", "b ", "c ", "d ", "e " - in this order - that occurs anywhere.

    A bare "B" has no "b " and is unparsable; "Banana " is an "A".
    """
    return next((letter for letter in LETTERS if f"{letter.lower()} " in text.lower()), None)


def letter(text: str, letters: str = LETTERS, options: Mapping[str, str] | None = None) -> str | None:
    """``strict``: the option's letter as a token of its own, or else the text of exactly one option.

    The first of these that applies decides:

    1. the full answer is a letter, in any case: "B", "b.", "(B)", "B)";
    2. the full answer is an option's text, or its letter and its text: "B. a cat";
    3. a letter is announced: "Answer: B", "the answer is (b)", "option B";
    4. capital letters that are only, or letters in brackets, and are all the same: "It is B.", "I choose (b)";
    5. exactly one option's text is in the answer in full (needs ``options``).

    The article is no option: a bare "a" inside a sentence, or an "A" that a word follows ("A dog runs", "The answer is
    a dog"), unless that word is one that follows no article: "A is right", "A and B", "A because".
    Two different letters by the same rule are unparsable.
    """
    text = " ".join(answer_text(text).split())
    if whole := re.fullmatch(rf"[(\[*\s]*([{letters}])[)\].:,*\s]*", text, re.IGNORECASE):
        return whole[1].upper()
    texts = {name: plain(option) for name, option in (options or {}).items()}
    given = plain(text)
    stated = {name for name, option in texts.items() if option and given in (option, f"{name.lower()} {option}")}
    if len(stated) == 1:
        return stated.pop()
    for pattern in (_announced(letters), _alone(letters)):
        found = {next(filter(None, match.groups())).upper() for match in pattern.finditer(text)}
        if found:
            return found.pop() if len(found) == 1 else None
    return one_of(text, texts)


def _announced(letters: str) -> re.Pattern[str]:
    """A letter after "answer is", "answer:", "option" or "choice", that is not the article of a noun."""
    cue = r"\b(?:(?i:answer|option|choice))(?i:\s+(?:is|would be|must be|should be))?\s*[:=]?\s*"
    others = letters.replace("A", "")
    bare = rf"(?:([{others}{others.lower()}])|([Aa])(?!\s+(?!{_AFTER}\b)\w))(?![\w'-])"
    return re.compile(rf"{cue}(?:\**[(\[]([{letters}{letters.lower()}])[)\]]|\**{bare})")


def _alone(letters: str) -> re.Pattern[str]:
    """A capital letter that is a full token, or any letter in brackets; not "A dog", "U.S.A." or "C-shaped"."""
    others = letters.replace("A", "")
    edge = r"(?![\w'-]|\.\w)"
    return re.compile(
        rf"[(\[]([{letters}{letters.lower()}])[)\]]"
        rf"|^([{letters.lower()}])[.):]\s"
        rf"|(?<!not )(?<![\w'.-])(?:([{others}]){edge}|(A){edge}(?!\s+(?!{_AFTER}\b)\w))"
    )


def one_of(text: str, options: Mapping[str, str]) -> str | None:
    """The key of the only option whose text is in the answer as full words.

    Case, punctuation and underscores do not count. An option that is only inside a longer one that was found
    ("ten" in "more than ten") is not found.
    """
    given = f" {plain(text)} "
    texts = {name: plain(option) for name, option in options.items()}
    found = set()
    for name in sorted(texts, key=lambda name: -len(texts[name])):
        if texts[name] and f" {texts[name]} " in given:
            found.add(name)
            given = re.sub(rf"(?<= ){re.escape(texts[name])}(?= )", "|", given)
    return found.pop() if len(found) == 1 else None


def letters_of(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Options by letter: a list gives A, B, C, ... in its order."""
    if isinstance(options, Mapping):
        return {str(name).upper(): text for name, text in options.items()}
    return {chr(ord("A") + i): text for i, text in enumerate(options)}
