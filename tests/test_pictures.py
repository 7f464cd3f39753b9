"""The formats and colours of the photographs that people have. Every file is made here."""

import io
import itertools
import struct

import numpy as np
import pytest
from pictures import open_picture
from PIL import Image, ImageCms
from test_data import data_options

import train_dti_sdxl as script


def numbers(*values: float) -> bytes:
    """ICC's s15Fixed16Numbers."""
    return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 with these tags and a white point."""
    tags = {b"wtpt": xyz(*WHITE), **tags}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(data), 0x02400000, b"mntr", space, connection, b"acsp")
    return head + numbers(*WHITE) + bytes(48) + struct.pack(">I", len(tags)) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + numbers(*values)


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def matrix_profile(red, green, blue, gamma: float = 2.2) -> bytes:
    names = zip((b"r", b"g", b"b"), (red, green, blue), strict=True)
    return icc_profile(
        b"RGB ", {x: y for n, v in names for x, y in ((n + b"XYZ", xyz(*v)), (n + b"TRC", curve(gamma)))}
    )


def printer_profile() -> bytes:
    """CMYK of inks that are no colours but greys: each of the first three takes three tenths of the lightness, black all."""
    corners = itertools.product((0, 1), repeat=4)
    grid = bytes(x for *inks, key in corners for x in (round(255 * (1 - key) * (1 - 0.3 * sum(inks))), 128, 128))
    straight = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = head + 4 * straight + grid + 3 * straight
    return icc_profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, connection=b"Lab ")


# The primaries' colours relative to the profile's white, D50, as the profiles of these spaces have them.
WHITE = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = matrix_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE_RGB = matrix_profile((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR_GREY = icc_profile(b"GRAY", {b"kTRC": curve(1.0)})


def colour(path) -> list[int]:
    """What the scripts and the examples make of a picture of one colour."""
    seen = np.asarray(script.open_image({"path": str(path), "bytes": None}))
    assert (seen == seen[0, 0]).all() and np.array_equal(seen, np.asarray(open_picture(path)))
    return seen[0, 0].tolist()


# Mode, colour and profile of a picture, and what it is in sRGB.
PROFILES = {
    "a telephone's": ("RGB", (234, 51, 35), DISPLAY_P3, (255, 0, 0)),
    "a camera's": ("RGB", (219, 0, 0), ADOBE_RGB, (255, 0, 0)),
    "sRGB": ("RGB", (234, 51, 35), SRGB, (234, 51, 35)),
    "transparent": ("RGBA", (234, 51, 35, 51), DISPLAY_P3, (255, 204, 204)),
    "grey": ("L", 128, LINEAR_GREY, (188, 188, 188)),
    "bitmap": ("1", 1, LINEAR_GREY, (255, 255, 255)),
    "transparent grey": ("LA", (128, 128), LINEAR_GREY, (221, 221, 221)),
    "grey in colours": ("L", 128, DISPLAY_P3, (128, 128, 128)),
    "print": ("CMYK", (255, 0, 0, 0), printer_profile(), (171, 171, 171)),
}


@pytest.mark.parametrize("kind", PROFILES)
def test_a_profile_s_colours_become_srgb_s(tmp_path, kind, caplog):
    mode, value, profile, expected = PROFILES[kind]
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8), value).save(path, icc_profile=profile)
    np.testing.assert_allclose(colour(path), expected, atol=2)
    assert not caplog.text


def test_a_palette_has_a_profile_too(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([234, 51, 35] + [0] * 765)
    image.save(tmp_path / "x.png", icc_profile=DISPLAY_P3)
    np.testing.assert_allclose(colour(tmp_path / "x.png"), (255, 0, 0), atol=2)


def test_a_turned_picture_keeps_its_profile(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8), (234, 51, 35)).save(tmp_path / "x.png", icc_profile=DISPLAY_P3, exif=exif)
    np.testing.assert_allclose(colour(tmp_path / "x.png"), (255, 0, 0), atol=2)


@pytest.mark.parametrize("profile", [b"no profile" * 20, DISPLAY_P3[:200], LINEAR_GREY, printer_profile()])
def test_a_profile_of_no_use_is_a_warning(tmp_path, caplog, profile):
    Image.new("RGB", (8, 8), (234, 51, 35)).save(tmp_path / "x.png", icc_profile=profile)
    for _ in range(3):
        assert colour(tmp_path / "x.png") == [234, 51, 35]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "x.png: its colours are taken for sRGB" in record.message


def test_a_camera_s_adobe_rgb_without_a_profile_is_a_warning(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x8769] = {0xA005: {1: "R03"}}
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (234, 51, 35)).save(file, "JPEG", exif=exif)
    (tmp_path / "x.jpg").write_bytes(file.getvalue())
    np.testing.assert_allclose(colour(tmp_path / "x.jpg"), (234, 51, 35), atol=2)
    assert "x.jpg says that its colours are Adobe RGB" in caplog.text
    caplog.clear()
    Image.new("RGB", (8, 8), (219, 0, 0)).save(tmp_path / "y.jpg", exif=exif, icc_profile=ADOBE_RGB)
    np.testing.assert_allclose(colour(tmp_path / "y.jpg"), (255, 0, 0), atol=2)
    assert not caplog.text


def test_the_training_sees_the_colours_of_the_profile(tmp_path):
    Image.new("RGB", (40, 40), (234, 51, 35)).save(tmp_path / "x.png", icc_profile=DISPLAY_P3)
    args = data_options(tmp_path)
    photographs = script.load_photographs(args)
    seen = script.TrainingExamples(photographs, [["a <new>"]], None, 0, args)[0]["pixel_values"]
    np.testing.assert_allclose(seen[:, 0, 0].tolist(), (1, -1, -1), atol=0.02)
