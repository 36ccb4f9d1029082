"""Where things that can be made or fetched again are kept, and whether the network may be asked. Looks at the environment only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables of the environment that forbid to ask the Hub."""


NO_CACHE = "LAYERCUT_NO_CACHE"
"""Variable of the environment that has everything measured anew."""


def cache_folder() -> Path:
    """Where layercut keeps what it made: $LAYERCUT_CACHE, else $XDG_CACHE_HOME/layercut, else ~/.cache/layercut."""
    own = os.environ.get("LAYERCUT_CACHE")
    return Path(own).expanduser() if own else _user_cache() / "layercut"


def measurement_cache() -> Path | None:
    """Where measurements are kept, a part of `cache_folder`; None when $LAYERCUT_NO_CACHE says that each is made anew."""
    off = os.environ.get(NO_CACHE, "").upper() in ("1", "ON", "YES", "TRUE")
    return None if off else cache_folder()


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, as it read its settings or, not imported yet, will by its documented rules."""
    client = sys.modules.get("huggingface_hub.constants")
    if client is not None:
        return _expanded(str(client.HF_HUB_CACHE))
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME")
    return _expanded(named) if named else (_expanded(home) if home else _user_cache() / "huggingface") / "hub"


def is_offline() -> bool:
    """Whether the user said that the Hub must not be asked, now or when its client was imported."""
    said = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)
    client = sys.modules.get("huggingface_hub.constants")
    return said or bool(getattr(client, "HF_HUB_OFFLINE", False))


def _user_cache() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME")
    return Path(shared) if shared else Path.home() / ".cache"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()
