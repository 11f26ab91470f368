"""Features of a frozen vision tower on disk: computed once, read in every later epoch and run.

Worth it where the same images are seen more than once with the same frozen tower: several epochs of stage 3, or
several runs. A file per image, whose name is the image's own hash, in a folder whose name is the hash of the tower's
weights and configuration and of the image processor's settings; so features of another tower or another size are never
taken by mistake. A file that was cut short is computed anew, and one that holds other bytes than were written is
refused by its checksum.

Notation: `N` tokens of an image, `C` width of the tower's last map.
"""

import copy
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image as PILImage
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature

from ..images import COLUMNS, decode_image, list_images, read_size


KEY = "vision_cache_key"  # where a stand-in image says which features are its own
NAMES = {"features", "size"}  # of the tensors of an entry
CHECKSUM = "crc32 of names, dtypes, shapes and values"  # its key in the header of an entry
# Settings that change neither what the tower sees nor what it computes.
IRRELEVANT = {
    "processor_class",
    "auto_map",
    "image_processor_type",
    "_name_or_path",
    "return_tensors",
    "device",
    "architectures",
    "dtype",  # that of the features is looked at by itself
    "transformers_version",
}


class VisionCache:
    """The features of one tower with one image processor.

    Args:
        folder: of the cache; may hold features of other towers as well.
        model: a model of this package; its vision tower computes the features.
        image_processor: as in training.
        dtype: of the features.

    Raises:
        ValueError: the tower is trained, so its features change.
    """

    def __init__(self, folder: str | Path, model: PreTrainedModel, image_processor, dtype: torch.dtype):
        tower = getattr(model.base_model, "vision_tower", None)
        if tower is None or model.config.model_type != "convllava":
            raise ValueError(f"features of a {model.config.model_type!r} model cannot be cached; expected 'convllava'.")
        if trained := [name for name, parameter in tower.named_parameters() if parameter.requires_grad]:
            raise ValueError(
                f"the vision tower is trained ({trained[0]} and {len(trained) - 1} more), so its features change; "
                "cache them where it is frozen, as in stage 3."
            )
        self.model, self.image_processor, self.dtype = model.base_model, image_processor, dtype
        digest = hashlib.sha256(str(dtype).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for part in (image_processor, model.config.vision_config):
            settings = {key: value for key, value in part.to_dict().items() if key not in IRRELEVANT}
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        self.folder = Path(folder) / digest.hexdigest()[:24]

    def get_path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def estimate_bytes(self, sizes: dict[str, tuple[int, int]]) -> int:
        """Bytes that images will take, from their heights and widths in pixels."""
        tokens = sum(self.image_processor.num_image_tokens(*size) for size in sizes.values())
        return tokens * self.model.config.vision_feature_size * self.dtype.itemsize

    def fill(self, dataset: Dataset, rank: int = 0, world_size: int = 1, show_progress: bool = True) -> str:
        """Computes what is missing.

        Args:
            dataset: with undecoded images, see `image_columns`.
            rank, world_size: this process computes its share.
            show_progress: a progress bar.

        Returns:
            What was there, what was computed, and the bytes, as a sentence.

        Raises:
            OSError: the disk is too small, which is said before anything is computed.
            ValueError: an image that cannot be read.
        """
        missing, stored, places = {}, set(), {}
        for row, index, image in tqdm(iterate_images(dataset), desc="Hashing images", disable=not show_progress):
            with name_image(row, index):
                key = hash_image(image)
                if key in missing or key in stored:
                    continue
                if self.is_whole(key):
                    stored.add(key)
                    continue
                missing[key], places[key] = read_size(image), (row, index)
        needed = self.estimate_bytes(missing)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        text = f"features of {len(stored)} images are in {self.folder}, {len(missing)} are to be computed: "
        text += f"{needed / 1e9:.3f} GB."
        if needed > free:
            raise OSError(f"{text} Only {free / 1e9:.3f} GB are free there: name another folder, or use no cache.")
        for key in tqdm(sorted(missing)[rank::world_size], desc="Caching features", disable=not show_progress):
            row, index = places[key]
            with name_image(row, index):
                original_rgb = getattr(self.image_processor, "original_rgb", False)
                image = decode_image(list_images(dataset[row])[index], original_rgb)
            self.store(key, image)
        return text

    @torch.no_grad()
    def store(self, key: str, image: PILImage.Image) -> None:
        """Computes and writes the features of one image; a file is there whole or not at all."""
        inputs = self.image_processor(images=[image], return_tensors="pt")
        features, _ = self.model._encode(inputs["pixel_values"].to(self.model.device))
        path = self.get_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        content = {"features": features[0].to(self.dtype).cpu().contiguous(), "size": inputs["image_sizes"][0]}
        save_file(content, unfinished, metadata={CHECKSUM: _sum(content)})
        os.replace(unfinished, path)

    def is_whole(self, key: str) -> bool:
        """Whether features are there in full length; their bytes are checked when they are read."""
        try:
            with safe_open(self.get_path(key), "pt") as file:
                return CHECKSUM in (file.metadata() or {}) and set(file.keys()) == NAMES
        except (OSError, SafetensorError):
            return False

    def load(self, key: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features `(N, C)` of an image, and its processed height and width in pixels.

        Raises:
            ValueError: they are not what was written; the file is removed, so that the next start computes them.
        """
        path = self.get_path(key)
        try:
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
                whole = set(content) == NAMES and (file.metadata() or {}).get(CHECKSUM) == _sum(content)
        except OSError:
            raise
        except Exception:  # a damaged header fails in many ways, in the format, in the dtypes and in the shapes
            whole = False
        if not whole:
            path.unlink(missing_ok=True)
            raise ValueError(f"{path} was damaged after it was written, and is removed: start again to compute it.")
        return content["features"], tuple(content["size"].tolist())


def _sum(content: dict[str, torch.Tensor]) -> str:
    """A checksum over tensors, with their names, dtypes and shapes, in the order of the names."""
    found = 0
    for name, tensor in sorted(content.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


class CachedImageProcessor:
    """Stands in for an image processor: gives stored features in the place of pixels.

    Args:
        image_processor: the one whose place it takes, for all else that is asked of it.
        cache: the features.
    """

    def __init__(self, image_processor, cache: VisionCache):
        self._image_processor, self._cache = image_processor, copy.copy(cache)
        self._cache.model = self._cache.image_processor = None  # workers need neither

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images, **kwargs) -> BatchFeature:
        flat = [image for row in images for image in (row if isinstance(row, (list, tuple)) else [row])]
        features, sizes = zip(*(self._cache.load(image.info[KEY]) for image in flat), strict=True)
        return BatchFeature({"vision_features": torch.cat(features), "image_sizes": torch.tensor(sizes)})


@contextmanager
def name_image(row: int, index: int) -> Iterator[None]:
    """Says in an error which image cannot be read."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read image {index} of row {row}: {error}") from error


def make_stand_in(image: dict) -> PILImage.Image:
    """A picture of one pixel that says which features it stands for."""
    picture = PILImage.new("RGB", (1, 1))
    picture.info[KEY] = hash_image(image)
    return picture


def iterate_images(dataset: Dataset) -> Iterator[tuple[int, int, dict]]:
    """Row, place in the row, and undecoded image, for every image."""
    columns = [name for name in COLUMNS if name in dataset.column_names]
    for row, images in enumerate(dataset.select_columns(columns)):
        for index, image in enumerate(list_images(images)):
            yield row, index, image


def hash_image(image: dict) -> str:
    """SHA-256 of an image file's bytes.

    Raises:
        ValueError: a decoded image, or one that is nowhere.
        OSError: no such file.
    """
    if not isinstance(image, dict) or not (image["bytes"] or image["path"]):
        found = "neither bytes nor a path" if isinstance(image, dict) else "a mode to be converted to, in its column"
        raise ValueError(f"it has {found}; features are kept by the hash of the file")
    return hashlib.sha256(image["bytes"] or Path(image["path"]).read_bytes()).hexdigest()
