"""The formats and colours of the photographs that people have. Every file is made here."""

import io
import itertools
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from pictures import open_picture
from PIL import Image, ImageCms, PngImagePlugin
from test_data import data_options
from test_fuzz import png_header

import train_dti_sana
import train_dti_sdxl as script
from train_dti_sdxl import UserError


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


# Formats that Pillow reads with the help of a package.

HALVES = Image.new("RGB", (64, 48), "red")
HALVES.paste("blue", (32, 0, 64, 48))
PACKAGES = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin", "AVIF": "pillow>=11.3"}


def encoded(kind: str, image: Image.Image = HALVES, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=95, **options)
    return file.getvalue()


def looks_like_halves(path) -> None:
    seen = np.asarray(script.open_image({"path": str(path), "bytes": None})).astype(int)
    assert seen.shape == (48, 64, 3)
    np.testing.assert_allclose(seen[24, 8], (255, 0, 0), atol=12)
    np.testing.assert_allclose(seen[24, 56], (0, 0, 255), atol=12)


@pytest.mark.parametrize(
    "kind, suffix", [("HEIF", ".heic"), ("HEIF", ".HIF"), ("HEIF", ".jpg"), ("JXL", ".jxl"), ("JXL", ".png")]
)
def test_telephones_and_cameras_formats_are_read(tmp_path, kind, suffix):
    (tmp_path / f"IMG_0001{suffix}").write_bytes(encoded(kind))
    (path,) = script.find_images(tmp_path)
    looks_like_halves(path)
    photographs = script.load_photographs(data_options(tmp_path))
    script.check_images(photographs, 32)
    assert open_picture(path).size == (64, 48)


def test_heif_s_profile_and_rotation_count_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.heic").write_bytes(encoded("HEIF", HALVES.rotate(90, expand=True), exif=exif.tobytes()))
    looks_like_halves(tmp_path / "a.heic")
    one_colour = Image.new("RGB", (48, 48), (234, 51, 35))
    (tmp_path / "b.heic").write_bytes(encoded("HEIF", one_colour, icc_profile=DISPLAY_P3))
    seen = script.open_image({"path": str(tmp_path / "b.heic"), "bytes": None})
    np.testing.assert_allclose(np.asarray(seen)[24, 24], (255, 0, 0), atol=8)


def test_what_exif_says_of_a_jpeg_xl_s_rotation_does_not_count(tmp_path):
    """By its standard: an Exif box tells what the camera did, and the decoder has turned the picture already."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jxl").write_bytes(encoded("JXL", exif=exif.tobytes()))
    looks_like_halves(tmp_path / "a.jxl")


def test_a_jpeg_within_jpeg_xl_keeps_its_rotation_and_profile(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", HALVES.size, (234, 51, 35))
    picture.paste(HALVES.crop((32, 0, 64, 48)), (32, 0))
    picture.rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif, quality=95, icc_profile=DISPLAY_P3)
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    looks_like_halves(tmp_path / "a.jxl")


@pytest.mark.parametrize(
    "options, said", [({"color_primaries": 12}, "Display P3"), ({"transfer_characteristics": 16}, "HDR")]
)
def test_colours_that_a_heif_file_names_without_a_profile_are_a_warning(tmp_path, caplog, options, said):
    (tmp_path / "a.heic").write_bytes(encoded("HEIF", **options))
    script.open_image({"path": str(tmp_path / "a.heic"), "bytes": None})
    assert f"a.heic says that its colours are {said}" in caplog.text


@pytest.fixture
def without_packages(monkeypatch):
    """As it is where only an old Pillow is installed."""
    Image.init()
    for kind in ("HEIF", "JXL", "AVIF"):
        for suffix in [suffix for suffix, owner in Image.EXTENSION.items() if owner == kind]:
            monkeypatch.delitem(Image.EXTENSION, suffix)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in PACKAGES])


Image.init()
FILES = {kind: encoded(kind) for kind in PACKAGES if kind in Image.SAVE}  # AVIF only where Pillow is new enough


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", [".heic", ".jpg"])
def test_what_nothing_installed_reads_is_left_out_with_a_warning(tmp_path, kind, suffix, without_packages, caplog):
    (tmp_path / f"a{suffix}").write_bytes(FILES[kind])
    with pytest.raises(UserError, match=f"--instance_data_dir .* not installed: .*pip install '{PACKAGES[kind]}'"):
        script.find_images(tmp_path)
    (tmp_path / "b.png").write_bytes(encoded("PNG"))
    assert [path.name for path in script.find_images(tmp_path)] == ["b.png"]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"'a{suffix}'" in record.message and f"pip install '{PACKAGES[kind]}'" in record.message
    with pytest.raises(UserError, match=f"is .*, and reading it needs `pip install '{PACKAGES[kind]}'`"):
        script.open_image({"path": None, "bytes": FILES[kind]})  # of a data set


# Large files.


def png_with(chunk: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk."""
    data = encoded("PNG")
    added = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return data[:33] + added + data[33:]  # behind the signature and the header


WORKFLOW = json.dumps({"workflow": list(range(400_000))}).encode()
LARGE = {
    "compressed text": png_with(b"zTXt", b"prompt\0\0" + zlib.compress(WORKFLOW)),
    "international text": png_with(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "plain text": png_with(b"tEXt", b"prompt\0" + WORKFLOW),
    "profile": png_with(b"iCCP", b"p\0\0" + zlib.compress(SRGB + bytes(2**21))),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_png_with_large_chunks_is_read(tmp_path, kind, monkeypatch):
    assert len(WORKFLOW) > 2**21
    (tmp_path / "a.png").write_bytes(LARGE[kind])
    looks_like_halves(tmp_path / "a.png")
    for name in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY"):
        monkeypatch.setattr(PngImagePlugin, name, 2**20)
    if kind != "profile":  # newer versions of Pillow read past it
        with pytest.raises(UserError, match="a.png has more than 1 MiB of text .*: save it without its metadata"):
            looks_like_halves(tmp_path / "a.png")


@pytest.mark.parametrize("module", [script, train_dti_sana])
def test_both_scripts_take_200_megapixels_and_name_the_limit(tmp_path, module, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_header(16320, 12240))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    module.widen_pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == (16320, 12240)
    (tmp_path / "a.png").write_bytes(png_header(60000, 60000))
    with pytest.raises(module.UserError, match="a.png has more than 536870912 pixels.*: make it smaller"):
        module.open_image({"path": str(tmp_path / "a.png"), "bytes": None})


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match="a.png cannot be read: No such file"):
        script.open_image({"path": str(tmp_path / "a.png"), "bytes": None})
    (tmp_path / "a.png").write_bytes(encoded("PNG")[:60])
    with pytest.raises(UserError, match="a.png is damaged"):
        script.open_image({"path": str(tmp_path / "a.png"), "bytes": None})
