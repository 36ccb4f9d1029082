"""Runs short-transformers once, in its own environment: one of its metrics over given tokens. Prints seconds of processor time as JSON.

    python benchmarks/engine_peer.py MODEL IDS.json METRIC

IDS.json is a list of lists of token ids. Imports nothing of layercut.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

METRICS = ("angular last", "angular all", "linear last", "euclidean last", "bi", "relative magnitude")


class Given(dict[str, Any]):
    """What its tokenizer would give."""

    def to(self, device: object) -> Given:
        return self


def metrics() -> dict[str, Any]:
    """All metrics of its module `dist`."""
    from short_transformers import dist

    functions = (
        dist.angular_distance_last_token,
        dist.angular_distance_all_tokens,
        dist.get_linear_approximation_ith_token(-1),
        dist.get_euclidian_dist_ith_token(-1),
        dist.bi_score,
        dist.relative_magnitude,
    )
    return dict(zip(METRICS, functions, strict=True))


def main() -> None:
    folder, path, metric = sys.argv[1:]
    import torch
    from short_transformers import ShortTransformer

    torch.set_num_threads(1)
    rows = [{"content": ids} for ids in json.loads(Path(path).read_text(encoding="utf-8"))]

    def tokenizer(content: list[int], **options: object) -> Given:
        return Given(input_ids=torch.tensor([content]), attention_mask=torch.ones(1, len(content), dtype=torch.int64))

    model = ShortTransformer.from_pretrained(folder, torch_dtype=torch.float32)
    model.set_metric(metrics()[metric])
    began = time.process_time()
    result = model.analyse_layers(dataset=rows, tokenizer=tokenizer, limit=len(rows))
    seconds = time.process_time() - began
    json.dump({"seconds": seconds, "rows": len(result), "first": [float(value) for value in result[0]]}, sys.stdout)


if __name__ == "__main__":
    main()
