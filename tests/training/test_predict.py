"""`fastlenet predict`: pictures of every kind become MNIST's form, and what is no picture is named."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("mlxtend")
pytest.importorskip("PIL")

import torch
from PIL import Image
from runs import idx_bytes, quick, run_command, write_idx

import fastlenet
from fastlenet.errors import install_command
from fastlenet.training import checkpoint, data, loop, predict

pytestmark = pytest.mark.xdist_group("LeNet")  # All that train it: the process compiles its kernels once.

# Of the network's own answers, those that a slightly different picture of the same digit cannot turn.
SURE = 0.99
PICTURES = 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three epochs on the demo's digits."""
    path = tmp_path_factory.mktemp("predict") / "checkpoint.safetensors"
    loop.train(quick(epochs=3, batch_size=64), checkpoint_file=path)
    return path


@pytest.fixture(scope="module")
def digits(file: Path) -> tuple[torch.Tensor, list[int]]:
    """Held-out digits (n, 28, 28), bytes, of which the network is sure; and what it takes them for."""
    sample = data.load_sample()
    images = (sample.test_images[:, 0, 2:-2, 2:-2] * sample.std + sample.mean).mul(255).round().byte()
    answers = predict.load_trained(file).probabilities(images.float() / 255).max(1)
    chosen = (answers.values > SURE).nonzero().flatten()[:PICTURES]
    assert len(chosen) == PICTURES
    assert (answers.indices[chosen] == sample.test_labels[chosen]).all()
    return images[chosen], answers.indices[chosen].tolist()


def picture(digit: torch.Tensor, size: int | None = None, dark: bool = False) -> Image.Image:
    """A digit (28, 28) of bytes as a picture of `size` pixels a side."""
    made = Image.fromarray((255 - digit if dark else digit).numpy())
    return made if size is None else made.resize((size, size), Image.Resampling.BICUBIC)


def answers(printed: str) -> list[int]:
    """The digits that the command's lines name."""
    return [int(line.split(": ")[1][0]) for line in printed.splitlines() if ", probability " in line]


@pytest.mark.parametrize("size", [28, 45, 300, 1000])
@pytest.mark.parametrize("dark", [False, True], ids=["light on dark", "dark on light"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_drawn_digits(
    file: Path, digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, dark: bool, suffix: str
) -> None:
    for number, digit in enumerate(digits[0]):
        picture(digit, size, dark).save(tmp_path / f"{number:02}.{suffix}")
    (tmp_path / "notes.txt").write_text("not a picture, and not called one")
    assert run_command("predict", file, tmp_path, "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert answers(captured.out) == digits[1]
    assert captured.err == ""


def test_what_is_printed(file: Path, digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(digits[0][0]).save(tmp_path / "digit.png")
    assert run_command("predict", file, tmp_path / "digit.png") == 0
    first, *bars = capsys.readouterr().out.splitlines()
    probabilities = predict.load_trained(file).probabilities(predict.read(tmp_path / "digit.png", 1)[0])[0]
    assert probabilities.sum() == pytest.approx(1)
    assert first == f"{tmp_path / 'digit.png'}: {digits[1][0]}, probability {probabilities.max():.1%}"
    assert len(bars) == 10
    for number, (line, share) in enumerate(zip(bars, probabilities.tolist(), strict=True)):
        assert line.split()[0] == str(number)
        assert line.count("#") == round(40 * share)
        assert line.endswith(f" {share:.1%}")


@pytest.mark.parametrize(("share", "doubt"), [(0.49, " (not sure)"), (0.5, "")])
def test_doubt(share: float, doubt: str) -> None:
    probabilities = torch.full((10,), (1 - share) / 9, dtype=torch.float64)
    probabilities[3] = share
    assert next(predict.lines("digit.png", probabilities)) == f"digit.png: 3, probability {share:.1%}{doubt}"


def test_the_network_sees_what_training_showed_it(file: Path) -> None:
    """The same padding and the same normalisation: the same outputs, bit for bit."""
    sample, trained = data.load_sample(), predict.load_trained(file, "cpu")
    bytes_of = (sample.test_images[:64, 0, 2:-2, 2:-2] * sample.std + sample.mean).mul(255).round()
    with torch.no_grad():
        expected = trained.model(sample.test_images[:64]).double().softmax(1)
    assert torch.equal(trained.probabilities(bytes_of / 255), expected)


def test_a_digit_is_placed_as_mnist_places_it(digits: tuple) -> None:
    """Its longer side has 20 pixels, its centre of mass is at most half a pixel from the centre."""
    for digit in digits[0]:
        shades = torch.zeros(400, 300)
        large = torch.nn.functional.interpolate(digit[None, None].float() / 255, (90, 90), mode="bilinear")[0, 0]
        shades[7:97, 200:290] = large
        made = predict.centred(predict.ink(shades))
        rows, columns = made.any(1).nonzero(), made.any(0).nonzero()
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) == 19
        for axis in (0, 1):
            mass = made.sum(1 - axis)
            centre = float((mass * torch.arange(28)).sum() / mass.sum())
            assert abs(centre - 14) <= 0.5 + 1e-4


@pytest.mark.parametrize("dark", [False, True])
def test_a_photograph(file: Path, digits: tuple, tmp_path: Path, dark: bool) -> None:
    """Grain, a shadow over the paper that is as deep as a third of the ink, and a digit off the middle."""
    generator = torch.Generator().manual_seed(3)
    shadow = 0.25 * torch.linspace(0, 1, 800)[None] + 0.1 * torch.linspace(0, 1, 600)[:, None]
    seen = []
    for digit in digits[0]:
        canvas = torch.zeros(600, 800)
        canvas[150:550, 30:430] = torch.nn.functional.interpolate(
            digit[None, None].float() / 255, (400, 400), mode="bicubic", antialias=True
        )[0, 0].clamp(0, 1)
        shades = (0.9 - shadow) * (1 - 0.8 * canvas) if dark else 0.1 + shadow + 0.5 * canvas
        shades = (shades + 0.02 * torch.randn(600, 800, generator=generator)).clamp(0, 1)
        Image.fromarray((shades * 255).byte().numpy()).save(tmp_path / "photo.jpg", quality=70)
        seen.append(predict.read(tmp_path / "photo.jpg", 1)[0])
    assert predict.load_trained(file).probabilities(torch.cat(seen)).argmax(1).tolist() == digits[1]


def _with_alpha(digit: torch.Tensor, shade: int) -> Image.Image:
    ink = Image.new("L", (28, 28), shade)
    return Image.merge("LA", (ink, picture(digit)))


MODES = {
    "colour": lambda digit: picture(digit).convert("RGB"),
    "16 bits": lambda digit: Image.fromarray(digit.numpy().astype("uint16") << 8),
    "black and white": lambda digit: picture(digit, 280).convert("1", dither=Image.Dither.NONE),
    "palette": lambda digit: picture(digit, dark=True).convert("P"),
    "black on nothing": lambda digit: _with_alpha(digit, 0),
    "white on nothing": lambda digit: _with_alpha(digit, 255),
    "colour on nothing": lambda digit: _with_alpha(digit, 0).convert("RGBA"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_png(file: Path, digits: tuple, tmp_path: Path, mode: str) -> None:
    for digit, answer in zip(digits[0], digits[1], strict=True):
        MODES[mode](digit).save(tmp_path / "digit.png")
        seen = predict.read(tmp_path / "digit.png", 1)[0]
        assert int(predict.load_trained(file).probabilities(seen).argmax()) == answer


def test_a_camera_held_sideways(digits: tuple, tmp_path: Path) -> None:
    upright = picture(digits[0][0], 280)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned, expected = (predict.read(tmp_path / f"{name}.png", 1)[0] for name in ("turned", "upright"))
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(
    file: Path, digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], compress: bool
) -> None:
    """By what they hold, not by their name; some images of many, and how many are left."""
    content = idx_bytes(digits[0])
    (tmp_path / "digits").write_bytes(gzip.compress(content) if compress else content)
    assert run_command("predict", file, tmp_path / "digits") == 0
    printed = capsys.readouterr().out
    assert answers(printed) == digits[1][:10]
    assert printed.splitlines()[-1] == f"{tmp_path / 'digits'}: 10 more images; --limit shows more"
    assert f"{tmp_path / 'digits'}, image 9: " in printed
    assert run_command("predict", file, tmp_path / "digits", "--limit", 5000) == 0
    printed = capsys.readouterr().out
    assert answers(printed) == digits[1]
    assert "more" not in printed


BAD = {
    "missing.png": (None, "cannot be read (No such file or directory)"),
    "empty.png": (b"", "not a PNG, JPEG or IDX file"),
    "letter.png": (b"Dear sir or madam", "not a PNG, JPEG or IDX file"),
    "other.gif": ("GIF", "not a PNG, JPEG or IDX file"),
    "half.png": ("PNG", "cannot be decoded"),
    "half.jpg": ("JPEG", "cannot be decoded"),
    "short.idx": (b"\0\0\x08\x03\0\0\0\1\0\0\0\x1c\0\0\0\x1cabc", "truncated"),
    "small.idx": (b"\0\0\x08\x03\0\0\0\1\0\0\0\1\0\0\0\1a", "images are 1x1, expected 28x28"),
    "labels.gz": (gzip.compress(b"\0\0\x08\x01\0\0\0\1a"), "too few for an IDX header"),
    "blank.png": ("blank", "shows nothing: all of it is of one shade"),
    "dot.png": ("dot", "shows nothing: all of it is of one shade"),
    "folder": ("folder", "a folder without PNG or JPEG files"),
}


def make_bad(path: Path, content: bytes | str | None, digit: torch.Tensor) -> None:
    if content == "folder":
        path.mkdir()
        (path / "notes.txt").touch()
    elif content in ("blank", "dot"):
        Image.new("L", (200, 100) if content == "blank" else (1, 1), 230).save(path)
    elif isinstance(content, str):
        picture(digit, 280).save(path, format=content)
        if content != "GIF":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_named_and_the_others_are_predicted(
    file: Path, digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, message = BAD[name]
    make_bad(tmp_path / name, content, digits[0][0])
    for place in (0, 1):
        picture(digits[0][place]).save(tmp_path / f"good{place}.png")
    assert run_command("predict", file, tmp_path / "good0.png", tmp_path / name, tmp_path / "good1.png") == 2
    captured = capsys.readouterr()
    assert answers(captured.out) == digits[1][:2]
    assert captured.err.startswith(f"fastlenet predict: error: {tmp_path / name}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_no_damage_is_more_than_one_line(digits: tuple, tmp_path: Path, format: str) -> None:
    """Whatever Pillow raises for a file cut or changed anywhere; where it still reads one, there is an image."""
    path = tmp_path / "picture"
    picture(digits[0][0], 60).save(path, format=format)
    content, messages = path.read_bytes(), []
    for position in torch.linspace(0, len(content) - 1, 120).long().tolist():
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        for damaged in (bytes(flipped), content[:position]):
            path.write_bytes(damaged)
            try:
                image, _ = predict.read(path, 1)
            except data.DataError as error:
                messages.append(str(error))
            else:
                assert image.shape == (1, 28, 28)
                assert image.isfinite().all()
    assert len(messages) > 100
    assert all(message.startswith(str(path)) for message in messages)


def test_pictures_that_would_fill_the_memory_are_refused(
    digits: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(digits[0][0], 60).save(tmp_path / "large.png")
    for limit in (2000, 1000):  # Pillow warns of the first and refuses the second.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match=r"large\.png: cannot be decoded \(Image size \(3600 pixels\)"):
            predict.read(tmp_path / "large.png", 1)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (2, 1), (2, 2), (1, 400), (400, 3), (2, 3)])
def test_the_smallest_and_narrowest_pictures(tmp_path: Path, height: int, width: int) -> None:
    shades = torch.zeros(height, width, dtype=torch.uint8)
    shades[0, 0] = 255
    Image.fromarray(shades.numpy()).save(tmp_path / "narrow.png")
    image, _ = predict.read(tmp_path / "narrow.png", 1)
    assert 0 < image.max() <= 1


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_stock_network_predicts_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(tmp_path)
    stock = loop.train(quick(tmp_path), model=fastlenet.StockLeNet(), output=tmp_path).model.eval()
    seen = data.load_idx(tmp_path)
    assert run_command("predict", tmp_path / "checkpoint.safetensors", tmp_path / "t10k-images-idx3-ubyte") == 0
    assert answers(capsys.readouterr().out) == stock(seen.test_images[:10]).argmax(1).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype(tmp_path: Path, digits: tuple, dtype: str) -> None:
    write_idx(tmp_path)
    loop.train(quick(tmp_path, epochs=1, dtype=dtype, optimizer="sgd"), output=tmp_path)
    trained = predict.load_trained(tmp_path / "checkpoint.safetensors", "cpu")
    assert trained.model.fc3.weight.dtype == loop.DTYPES[dtype]
    assert trained.probabilities(digits[0] / 255).sum(1).tolist() == pytest.approx([1] * PICTURES)


def test_wrong_checkpoints_get_one_line(
    file: Path, digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    image = tmp_path / "digit.png"
    picture(digits[0][0]).save(image)
    (tmp_path / "garbage").write_bytes(b"no checkpoint")
    save_file(fastlenet.StockLeNet().state_dict(), tmp_path / "weights")
    torch.save(fastlenet.StockLeNet().state_dict(), tmp_path / "pickled")
    stored = checkpoint.load(file)

    def save(name: str, model: torch.nn.Module, config: dict) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        checkpoint.save(tmp_path / name, model, optimizer, epoch=1, step=1, config=config, history=[], rng={})

    save("seven", fastlenet.StockLeNet(num_classes=7), stored.config)
    save("linear", torch.nn.Linear(2, 2), stored.config)
    old = {name: value for name, value in stored.config.items() if name not in ("mean", "std")}
    save("old", fastlenet.LeNet(), old)
    for name, message in {
        "missing": "there is no checkpoint",
        "garbage": "is damaged or no safetensors file",
        "pickled": "is damaged or no safetensors file",
        "weights": "is a safetensors file but no fastlenet-checkpoint",
        "digit.png": "is damaged or no safetensors file",
        "seven": "fc3.weight is float32 [7, 84], expected float32 [10, 84]",
        "linear": "no conv1.weight",
        "old": "train one more epoch with --resume",
    }.items():
        assert run_command("predict", tmp_path / name, image) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fastlenet predict: error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.cheap
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: CHECKPOINT, IMAGE"),
        (["DIGIT"], "required: IMAGE"),
        (["CHECKPOINT", "DIGIT", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["CHECKPOINT", "DIGIT", "--device", "warp"], "device 'warp'"),
    ],
)
def test_bad_input_gets_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"CHECKPOINT": file, "DIGIT": file}
    assert run_command("predict", *(names.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_pillow_is_asked_for_where_it_is_needed(
    file: Path, digits: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(digits[0][0]).save(tmp_path / "digit.png")
    (tmp_path / "digits").write_bytes(idx_bytes(digits[0][:2]))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert run_command("predict", file, tmp_path / "digits") == 0
    assert answers(capsys.readouterr().out) == digits[1][:2]
    assert run_command("predict", file, tmp_path / "digit.png") == 2
    assert f"the package PIL is not installed: {install_command('fastlenet[demo]')}" in capsys.readouterr().err


@pytest.mark.wide
def test_as_a_module(file: Path, digits: tuple, tmp_path: Path) -> None:
    """In an order that a log shows, too."""
    name = tmp_path / "digit-\udcff.png"  # a name that is no text
    picture(digits[0][0]).save(name)
    command = [sys.executable, "-m", "fastlenet", "predict", str(file), str(name), "nothing", str(name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=tmp_path)
    assert done.returncode == 2
    text = done.stdout.decode()
    assert answers(text) == [digits[1][0]] * 2
    assert r"digit-\udcff.png" in text
    assert text.splitlines()[11].startswith("fastlenet predict: error: nothing: cannot be read")
