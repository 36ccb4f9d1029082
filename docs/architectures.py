"""Writes docs/architectures.md: every model type of the installed transformers is cut, and what came of it is listed.

    python docs/architectures.py [TASK:TYPE ...]

Without arguments all of them are run, which takes a quarter of an hour; with arguments these, and the other rows stay.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
NAMES = {
    "causal": "Language models", "image": "Models that read images, and others with a language model inside", "masked": "Encoders",
    "seq2seq": "Encoder-decoders, and speech",
}  # fmt: skip


def document(rows: Mapping[str, str], version: str) -> str:
    """The page: outcomes by `task:type`."""
    lines = [
        "<!-- Written by docs/architectures.py. -->", "", "# Architectures", "",
        f"What becomes of a cut, for every model type of transformers {version}, in its four lists of models for text.",
        "A tiny random model of each type is saved by transformers, cut by layercut at the first, second, middle, last but one and last",
        "layer and once a block, loaded again, and compared with the source in which these layers are skipped in memory: no tensor",
        "missing, unexpected or of another shape, fp32 logits within 2e-4, and where the class generates, the same eight tokens with a",
        "cache as without. A layer that is skipped is one that never stood in its list: where layers run in a loop, it is left out of",
        "every run, and what layers hand on beside the hidden states (the router's state of ZAYA, the blocks of Inkling 2) passes it by.",
        "What the first layer does for all of them is not part of it: the position bias of T5, the norm of the embeddings of RWKV.", "",
        "- **exact**: all of this holds at every place.",
        "- **refused**: layercut says why and writes nothing. With `allow: inexact` some of these are written, and the report says so.",
        "- **not run**: transformers cannot run the type here. Packages that towers of some types need (timm, torchvision, scipy) were",
        "  installed.", "",
        "Where the arithmetic of a layer depends on its index or on the depth, its weights make up for it (`beam`, `diffllama`, `esmc`,",
        "`gpt2` with `scale_attn_by_inverse_layer_idx`). Depth-dependent values that cannot say the new order, parts that only some layers",
        "have, and shared weights are why some places are refused. Types that layercut does not know are cut by the same rules; what",
        "these cannot explain stops the run, and a recipe can declare it (`architecture`).",
        "",
        "| list | types | exact everywhere | refused at some places | refused everywhere | not run |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    by_task = {task: {name.partition(":")[2]: told for name, told in rows.items() if name.startswith(f"{task}:")} for task in NAMES}
    for task, found in by_task.items():
        count = Counter(map(kind_of, found.values()))
        cells = (len(found), *(count[kind] for kind in ("exact", "some", "refused", "not run")))
        lines.append(f"| {NAMES[task]} (`{task}`) | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *sections(rows)]) + "\n"


def sections(rows: Mapping[str, str]) -> list[str]:
    """Lines of a section for each task: a table of its types, in order."""
    lines: list[str] = []
    for task, title in NAMES.items():
        lines += ["", f"## {title} (`{task}`)", "", "| type | outcome |", "|---|---|"]
        found = sorted((name.partition(":")[2], told) for name, told in rows.items() if name.startswith(f"{task}:"))
        lines += [f"| `{name}` | {told.replace('|', chr(92) + '|')} |" for name, told in found]
    return lines


def kind_of(told: str) -> str:
    """The column that an outcome counts in."""
    if told.startswith("not run"):
        return "not run"
    if told == "exact":
        return "exact"
    return "some" if "exact" in told else "refused"


def listed(page: Path = PAGE) -> dict[str, str]:
    """The rows of a page as it stands, outcomes by `task:type`."""
    rows: dict[str, str] = {}
    task = ""
    for line in page.read_text(encoding="utf-8").splitlines() if page.exists() else ():
        heading = re.fullmatch(r"## .* \(`(\w+)`\)", line)
        task = heading[1] if heading else task
        cells = re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line)
        if cells and task:
            rows[f"{task}:{cells[1]}"] = cells[2].replace("\\|", "|")
    return rows


def write(
    page: Path, wanted: list[str], outcome: Callable[[str, str, Path], str], document: Callable[[Mapping[str, str], str], str]
) -> int:
    """Run the types, all if none is wanted, and write the page; 1 when something is wrong. `outcome` is given type, task and a folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    import zoo

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    rows = listed(page) if wanted else {}
    for kind, task in zoo.pairs():
        name = f"{task}:{kind}"
        if not wanted or name in wanted:
            with tempfile.TemporaryDirectory() as scratch:
                os.environ["LAYERCUT_CACHE"] = f"{scratch}/cache"
                rows[name] = outcome(kind, task, Path(scratch))
            print(name, rows[name], file=sys.stderr, flush=True)
    page.write_text(document(rows, transformers.__version__), encoding="utf-8")
    return int(any("wrong" in told for told in rows.values()))


def main(wanted: list[str]) -> int:
    """Run the types and write the page."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import sweep

    return write(PAGE, wanted, lambda *given: sweep.row(sweep.examine(*given)), document)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
