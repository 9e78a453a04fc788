"""OME-Zarr stores: layout, metadata, whole-shard writing, the journal, pyramid reduction."""

from tilepipe.store.colors import channel_colors
from tilepipe.store.create import check_free, check_outside, create_store, what_is_at
from tilepipe.store.files import Files, LocalFiles, open_files, overlap
from tilepipe.store.journal import Journal, Record
from tilepipe.store.label import Label, Probabilities
from tilepipe.store.layout import EXPORTED, TISSUE, image_codec
from tilepipe.store.lease import leased
from tilepipe.store.level import Level, checksum_of
from tilepipe.store.open import open_store
from tilepipe.store.recent import RecentUnits
from tilepipe.store.reduce import reduce_image, reduce_label
from tilepipe.store.store import Store
from tilepipe.store.windows import Shades, fit_windows, shades_of

__all__ = [
    "EXPORTED",
    "TISSUE",
    "Files",
    "Journal",
    "Label",
    "Level",
    "LocalFiles",
    "Probabilities",
    "RecentUnits",
    "Record",
    "Shades",
    "Store",
    "channel_colors",
    "check_free",
    "check_outside",
    "checksum_of",
    "create_store",
    "fit_windows",
    "image_codec",
    "leased",
    "open_files",
    "open_store",
    "overlap",
    "reduce_image",
    "reduce_label",
    "shades_of",
    "what_is_at",
]
