"""Photographs for the other examples, which find and decode them by the training scripts' own functions."""

import io
import sys
from pathlib import Path

from export import UserError
from PIL import Image


sys.path.append(str(Path(__file__).resolve().parents[1]))

import train_dti_sdxl as training  # noqa: E402
from train_dti_sdxl import same_name  # noqa: E402, F401


def open_picture(path: Path) -> Image.Image:
    """A picture, upright and in sRGB, transparency over white. Raises UserError."""
    try:
        return training.open_image({"path": str(path), "bytes": None})
    except training.UserError as error:
        raise UserError(str(error)) from None


def png(picture: Image.Image) -> bytes:
    """A PNG file's content."""
    picture.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def pictures_in(folder: Path, option: str) -> list[Path]:
    """The pictures in a folder, by name; `option` is what gave it. Raises UserError."""
    try:
        return training.find_images(folder, option)
    except training.UserError as error:
        raise UserError(str(error)) from None


def open_mask(path: Path, picture: Image.Image) -> Image.Image:
    """A picture's mask in grey, white where the subject is. Raises UserError for one that does not fit it."""
    try:
        mask = training.open_image({"path": str(path), "bytes": None}, convert=training.grey_mask)
        training.check_mask(mask, picture.size, str(path))
    except training.UserError as error:
        raise UserError(str(error)) from None
    return mask


def check_apart(output_dir: Path, folder: Path) -> None:
    """Refuse to write where the pictures are that are read. Raises UserError."""
    try:
        training.check_apart(output_dir, folder)
    except training.UserError as error:
        raise UserError(str(error)) from None
