"""Writes docs/measured.md: every model type of the installed transformers is measured, and what came of it is listed.

    python docs/measured.py [TASK:TYPE ...]

Without arguments all of them are run, which takes ten minutes; with arguments these, and the other rows stay.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "tests"), str(DOCS.parent)]

import architectures  # noqa: E402

PAGE = DOCS / "measured.md"
KINDS = ("measured", "in memory only", "refused", "not run")


def document(rows: Mapping[str, str], version: str) -> str:
    """The page: outcomes by `task:type`."""
    lines = [
        "<!-- Written by docs/measured.py. -->", "", "# What is measured", "",
        f"What becomes of `layercut analyze`, and of a cut that is left to measuring, for every model type of transformers {version}.",
        "A tiny random model of each type is measured on four texts of different lengths, padded to one batch where the type allows it.",
        "The states between its layers are compared with those that plain hooks see in the model of the task, one text at a time,",
        "without pads and mask: all L + 1 of them agree to 2e-4 of their size. No hook stays attached.", "",
        "- **measured**: this holds, and streamed layer by layer the numbers are the same.",
        "- **measured in memory only**: this holds; what is larger than memory is refused, with the reason given here.",
        "- **refused**: layercut says why and measures nothing. Recipes without `auto` need no measuring.",
        "- **not run**: transformers cannot run the type here. Packages that towers of some types need (timm, torchvision, scipy) were",
        "  installed.", "",
        "Encoder-decoders read the text on both sides; `stack: encoder` and `stack: decoder` pick the side. Models that also read",
        "images or hear are given the text alone. Where layers keep several residual streams, a state is all of them side by side.",
        f"Types in which pads change other tokens whatever the mask ({', '.join(f'`{kind}`' for kind in sorted(_padded()))})",
        "are measured in batches of one length.", "",
        "| list | types | " + " | ".join(KINDS) + " |", "|---|" + "---:|" * (1 + len(KINDS)),
    ]  # fmt: skip
    for task, title in architectures.NAMES.items():
        count = Counter(kind_of(told) for name, told in rows.items() if name.startswith(f"{task}:"))
        lines.append(f"| {title} (`{task}`) | {' | '.join(map(str, (count.total(), *(count[kind] for kind in KINDS))))} |")
    return "\n".join([*lines, *architectures.sections(rows)]) + "\n"


def kind_of(told: str) -> str:
    """The column that an outcome counts in: the least of its stacks."""
    if told.startswith("not run"):
        return "not run"
    if re.search(r"(^|: )refused: ", told):
        return "refused"
    return "in memory only" if "measured in memory only" in told else "measured"


def _padded() -> Mapping[str, str]:
    from layercut.exceptions import PADDED

    return PADDED


def main(wanted: list[str]) -> int:
    """Run the types and write the page."""
    import measuring

    return architectures.write(PAGE, wanted, lambda *given: measuring.row(measuring.examine(*given)), document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
