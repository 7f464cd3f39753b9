"""Find and decode photographs with the training scripts' own functions, for the other examples."""

import io
import sys
from pathlib import Path

from export import UserError
from PIL import Image


sys.path.append(str(Path(__file__).resolve().parents[1]))

import train_dti_sdxl as training  # noqa: E402
from train_dti_sdxl import same_name  # noqa: E402, F401


def open_picture(path: Path) -> Image.Image:
    """Read a picture: upright, in sRGB, with transparent parts over white. Raises UserError."""
    try:
        return training.open_image({"path": str(path), "bytes": None})
    except training.UserError as error:
        raise UserError(str(error)) from None


def png(picture: Image.Image) -> bytes:
    """A PNG file's content."""
    picture.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def pictures_in(folder: Path, option: str) -> list[Path]:
    """The pictures in a folder, sorted by name. `option` is named in errors. Raises UserError."""
    try:
        return training.find_images(folder, option)
    except training.UserError as error:
        raise UserError(str(error)) from None


def open_mask(path: Path, picture: Image.Image) -> Image.Image:
    """Read a picture's mask in grey, white on the subject. Raises UserError if it does not fit the picture."""
    try:
        mask = training.open_image({"path": str(path), "bytes": None}, convert=training.grey_mask)
        training.check_mask(mask, picture.size, str(path))
    except training.UserError as error:
        raise UserError(str(error)) from None
    return mask


def check_apart(output_dir: Path, folder: Path) -> None:
    """Refuse an output folder that is, contains or is inside the pictures' folder. Raises UserError."""
    try:
        training.check_apart(output_dir, folder)
    except training.UserError as error:
        raise UserError(str(error)) from None
