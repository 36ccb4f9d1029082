"""Reading: the samples of a calibration, from all of its sources, and an account of where they came from."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from layercut.calibration import Calibration, MixCalibration, described, sources
from layercut.documents import Tally, passages
from layercut.encoding import SharedTokenizer
from layercut.errors import CalibrationError
from layercut.mixing import shares, turns
from layercut.sampling import samples, shuffled


class Text(NamedTuple):
    """All samples, in the order in which they are measured; kept small."""

    ids: list[array[int]]
    """Tokens of each sample."""
    completions: list[bytes | None]
    """For each token of a sample 1 when the assistant wrote it, else 0; None where that was not asked, or for plain text."""

    @property
    def sequences(self) -> Iterator[Sequence[int]]:
        """All that numbers depend on."""
        yield from self.ids
        yield from (list(completion or b"") for completion in self.completions)


class Reading(NamedTuple):
    """The text as tokens, and how it was read."""

    text: Text
    calibration: Calibration
    tokenizer: SharedTokenizer
    owners: Sequence[int]
    """The number of the source of each sample."""
    tallies: Sequence[Tally]
    """What was read of each source."""
    wanted: Sequence[int]
    """Samples that were asked of each source."""

    def account(self, used: int) -> dict[str, Any]:
        """What was read, and where the first `used` samples, those that were measured, came from: plain JSON data."""
        skipped: Counter[str] = Counter()
        for tally in self.tallies:
            skipped.update(tally.skipped)
        found: dict[str, Any] = {
            "documents_read": sum(tally.read for tally in self.tallies),
            "documents_skipped": dict(skipped),
            "bos": self._bos(used),
            "bos_policy": self.calibration.bos,
            "prefix": self.tokenizer.tokens(self.tokenizer.prefix),
        }
        if isinstance(self.calibration, MixCalibration):
            found["by_source"] = [self._part(number, used) for number in range(len(self.tallies))]
        return found

    def _part(self, number: int, used: int) -> dict[str, Any]:
        """One source of a mix."""
        own = [sample for sample, owner in enumerate(self.owners[:used]) if owner == number]
        return {
            **described(sources(self.calibration)[number]),
            "samples_wanted": self.wanted[number],
            "samples_found": sum(owner == number for owner in self.owners),
            "samples": len(own),
            "tokens": sum(len(self.text.ids[sample]) for sample in own),
            "documents_read": self.tallies[number].read,
            "documents_skipped": dict(self.tallies[number].skipped),
        }

    def _bos(self, used: int) -> str:
        """In words, from the samples themselves."""
        first = [ids[:1].tolist() for ids in self.text.ids[:used]]
        start = [self.tokenizer.begins(ids) or ids == self.tokenizer.prefix[:1] for ids in first]
        return "added" if all(start) else f"in {sum(start)} of {len(start)} samples" if any(start) else "not added"


def read(calibration: Calibration, tokenizer: SharedTokenizer, completions: bool = False, held_out: bool = False) -> Reading:
    """The samples: of each source its share, in turns. A source that ends too soon gives fewer, and no other fills in for it.

    `held_out` gives as many others, none of which is among the first: of the built-in text its other part, from the end, as `evaluate`
    begins at its beginning, and of other sources those that follow. With `completions` it is found out which tokens the assistant wrote.
    Raises CalibrationError when a source that was asked for samples has none.
    """
    parts = sources(calibration)
    mixed = isinstance(calibration, MixCalibration)
    tallies = [Tally(part.title) if mixed else Tally() for part in parts]
    wanted = shares([getattr(part, "weight", 1) for part in parts], calibration.most)
    whole = [
        samples(passages(part, held_out, tally), tokenizer, calibration, tally, completions)
        for part, tally in zip(parts, tallies, strict=True)
    ]
    own = [held_out and part.source == "builtin" for part in parts]
    found = [reversed(list(all_)) if back else shuffled(all_, calibration.seed) for all_, back in zip(whole, own, strict=True)]
    passed = [count if held_out and not back else 0 for back, count in zip(own, wanted, strict=True)]
    found = [itertools.islice(one, count, None) for one, count in zip(found, passed, strict=True)]
    text, owners = Text([], []), list[int]()
    for number in turns(wanted):
        sample = next(found[number], None)
        if sample is not None:
            text.ids.append(array("q", sample.ids))
            text.completions.append(None if sample.completion is None else bytes(sample.completion))
            owners.append(number)
    for number, tally in enumerate(tallies):
        if wanted[number] and number not in owners:
            if passed[number]:
                message = f"{tally.title} has no more than the {passed[number]} samples that layers are chosen on"
                raise CalibrationError(f"{message}: none is left to compare choices on", hint="lower samples, or use more text")
            raise tally.nothing()
    return Reading(text, calibration, tokenizer, owners, tallies, wanted)
