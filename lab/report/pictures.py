"""Anybody's pictures: what trained networks say of them.

In come paths and trained networks with what they know; out come a line and a figure for each.
"""

from __future__ import annotations

import os
import struct
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.font_manager
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from lab.data.images import IMAGE_SIZE
from lab.machine.device import Hardware
from lab.machine.files import as_csv, write_file
from lab.machine.options import PROGRAM, UserError
from lab.measure import gradcam, trainings
from lab.measure.evaluation import Outputs, outputs_of
from lab.measure.familiar import Familiar, Familiarity
from lab.measure.models import Network, TrainedModel, fingerprint
from lab.report import drawing, page, records
from lab.report.drawing import Picture, PictureBlock

LARGEST_SIDE = 1024  # pixels, of a picture as it is shown
LONGEST_NAME = 150  # bytes, of a figure's file


@dataclass(frozen=True)
class OwnPicture:
    """The middle square of somebody's picture: as it is, and as the networks see it."""

    path: Path
    square: np.ndarray  # uint8 [S, S, 3] RGB, S at most `LARGEST_SIDE`
    small: np.ndarray  # uint8 [32, 32, 3]
    frames: int  # more than one of an animation, of which this is the first

    def pixels(self) -> Tensor:
        """As the networks see it: uint8 [1, 32, 32, 3]."""
        return torch.from_numpy(self.small.copy())[None]


def read_picture(path: Path) -> OwnPicture:
    """From any format that Pillow reads; UserError with the reason where it can't.

    Turned as its EXIF data says, what is transparent on white, 16 bits cut to 8.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                image.draft("RGB", (2 * LARGEST_SIDE, 2 * LARGEST_SIDE))  # large JPEGs, faster
                square = middle_square(in_rgb(turned_upright(image)))
    except FileNotFoundError as error:
        raise UserError(say_absent(path)) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels: make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(say_unknown(path)) from error
    except IsADirectoryError as error:
        raise UserError(f"the folder {path} holds no picture") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise UserError(f"{path} can't be read as a picture: {error}") from error
    small = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)  # antialiased
    return OwnPicture(path, np.asarray(square), np.asarray(small), frames)


def say_absent(path: Path) -> str:
    """That there is no such file, or that it is an address."""
    scheme, colon, _ = str(path).partition(":/")
    if colon and scheme in ("http", "https", "ftp", "file"):
        address = str(path).replace(":/", "://", 1)
        return f"{address} is an address: download the picture, and name its file"
    return f"{path}: there is no such file"


def say_unknown(path: Path) -> str:
    """That a file is no picture, with the cure where there is one."""
    problem = f"{path} is not a picture, or of a format that is not known"
    if path.suffix.lower() in (".heic", ".heif"):
        problem += "; pip install pillow-heif reads those of iPhones"
    return problem


def know_heic() -> None:
    """Let Pillow read HEIC, as iPhones take it, where a package for it is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def turned_upright(image: Image.Image) -> Image.Image:
    """As its EXIF data says; as it is where that data is damaged, as some phones leave it."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def in_rgb(image: Image.Image) -> Image.Image:
    """In 8 bits a channel; ValueError where that has no meaning."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) // 256  # 16 bits, whatever holds them
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known scale; save it in 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def middle_square(image: Image.Image) -> Image.Image:
    """The largest square in its middle, made smaller where it is larger than is shown."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    if side > LARGEST_SIDE:
        square = square.resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
    return square


@dataclass(frozen=True)
class OwnAnswer:
    """What a network says of a picture."""

    network: Network
    likeliest: tuple[tuple[str, float], ...]  # classes with their probability, temperature scaled
    heatmap: np.ndarray  # float32 [32, 32], for the likeliest class

    def says(self) -> list[str]:
        """Each class with its probability."""
        return [f"{name} {probability:.0%}" for name, probability in self.likeliest]


@dataclass(frozen=True)
class Classifier:
    """A trained network with what it needs to speak of any picture, in the arithmetic that it was
    trained in."""

    trained: TrainedModel
    familiar: Familiar
    classes: tuple[str, ...]

    def outputs(self, picture: OwnPicture, hardware: Hardware) -> Outputs:
        """What it computes of the picture as it sees it."""
        hardware = replace(hardware, precision=self.trained.checkpoint.precision)
        return outputs_of(self.trained.model, picture.pixels(), hardware, with_stages=True)

    def probabilities(self, picture: OwnPicture, hardware: Hardware) -> dict[str, float]:
        """Of each class, temperature scaled, the likeliest first."""
        return self.scaled(self.outputs(picture, hardware))

    def scaled(self, outputs: Outputs) -> dict[str, float]:
        """The same of outputs."""
        chances = (outputs.logits[0] / self.familiar.temperature).softmax(0)
        order = chances.argsort(descending=True, stable=True).tolist()
        return {self.classes[i]: float(chances[i]) for i in order}

    def answer(self, picture: OwnPicture, outputs: Outputs) -> OwnAnswer:
        """What it says of the picture, from its outputs, and where it looks."""
        likeliest = tuple(self.scaled(outputs).items())[:3]
        called = torch.tensor([self.classes.index(likeliest[0][0])])
        return OwnAnswer(
            network=self.trained.network,
            likeliest=likeliest,
            heatmap=gradcam.heatmaps_of(self.trained.model, picture.pixels(), called)[0].numpy(),
        )


def load(
    jobs: Sequence[trainings.Job[Any]], results: Path, precision: str, hardware: Hardware
) -> tuple[list[Classifier], Familiarity]:
    """The jobs' networks on the device, with what they know of the images that they learnt.

    From their files, and from the folder of the run's results; UserError where a run has not made
    them. `precision` is as in `trainings.load`.
    """
    cure = "run main.py first, with the same options but --predict"
    path, classes, familiarity = records.read_familiar(results, cure)
    networks = []
    for job in jobs:
        if not job.path.exists():
            raise UserError(f"{job.path} is missing: {cure}")
        one = trainings.load(job.path, job, len(classes), precision)
        known = familiarity.networks.get(job.network.key)
        if known is None or known.fingerprint != fingerprint(one.checkpoint.state_dict):
            raise UserError(f"{job.path} is not what {path} speaks of: {cure}")
        one.model.to(hardware.device)
        networks.append(Classifier(one, known, classes))
    return networks, familiarity


@dataclass(frozen=True)
class Answers:
    """What all networks say of a picture."""

    by_network: tuple[OwnAnswer, ...]
    is_unlike: bool  # stranger to them than a share of the test images


def answer_all(
    picture: OwnPicture,
    networks: Sequence[Classifier],
    familiarity: Familiarity,
    hardware: Hardware,
) -> Answers:
    """What each network says of a picture, and whether it is unlike what they learnt."""
    answers = []
    outputs = {}
    for network in networks:
        of_network = network.outputs(picture, hardware)
        outputs[network.trained.network.key] = of_network
        answers.append(network.answer(picture, of_network))
    return Answers(tuple(answers), bool(familiarity.is_unlike(outputs)))


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The paths, and in place of a folder its pictures, by name; itself where it has none."""
    know_heic()
    endings = set(Image.registered_extensions())
    pictures = []
    for path in paths:
        if not path.is_dir():
            pictures.append(path)
            continue
        inside = []
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in endings and not file.name.startswith("."):
                inside.append(file)
        pictures += inside or [path]
    return pictures


def look_at(
    paths: Sequence[Path],
    networks: Sequence[Classifier],
    familiarity: Familiarity,
    folder: Path,
    hardware: Hardware,
) -> int:
    """A line for each picture; in `folder` a figure, rows in predictions.csv, a place on a page.

    One that can't be read, or whose figure can't be written, costs a line. Returns how many.
    """
    failures = 0
    taken: set[str] = set()
    on_page = []
    rows: list[list[str]] = [["file", "network", "class", "confidence", "warned"]]
    for path in paths:
        try:
            picture = read_picture(path)
            answers = answer_all(picture, networks, familiarity, hardware)
            print(say_answers(picture, answers, familiarity.share))
            name = free_name(path.stem, taken)
            taken.add(name.casefold())
            write_file(folder / f"{name}.png", drawn(picture, answers))
        except UserError as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
            failures += 1
            continue
        except OSError as error:
            problem = f"{path}: its figure can't be written ({error.strerror})"
            print(f"{PROGRAM}: {problem}", file=sys.stderr)
            failures += 1
        on_page.append(as_on_page(picture, answers))
        for answer in answers.by_network:
            likeliest, confidence = answer.likeliest[0]
            warned = str(answers.is_unlike)
            rows.append([str(path), answer.network.key, likeliest, f"{confidence:.4f}", warned])
    if len(rows) > 1:
        write_file(folder / "predictions.csv", as_csv(rows))
        warning = say_how_often_warned(familiarity)
        shown = page.own_pictures(on_page, familiarity.share, warning)
        write_file(folder / "report.html", shown)
        print(warning)
        print(f"Figures, and a table predictions.csv, are in {folder}/; open report.html there")
    return failures


def as_on_page(picture: OwnPicture, answers: Answers) -> page.OwnPicture:
    """The picture as the page shows it."""
    shown = []
    for answer in answers.by_network:
        heat = drawing.overlay(picture.square, answer.heatmap, size=len(picture.square))
        address = page.photo_address(heat)
        shown.append(page.OwnAnswer(answer.network.title, ", ".join(answer.says()), address))
    return page.OwnPicture(
        name=picture.path.name,
        square=page.photo_address(picture.square),
        small=page.picture_address(picture.small),
        is_unlike=answers.is_unlike,
        answers=shown,
    )


def free_name(stem: str, taken: set[str]) -> str:
    """The stem, with a number from 2 on where others of this run have it.

    Shortened where file systems would refuse it; upper and lower case are taken for the same, as
    some disks do.
    """
    while len(os.fsencode(stem)) > LONGEST_NAME:
        stem = stem[:-1]
    name = stem
    number = 2
    while name.casefold() in taken:
        name = f"{stem}_{number}"
        number += 1
    return name


def drawn(picture: OwnPicture, answers: Answers) -> bytes:
    """The figure's file. Letters that no font here has are drawn as boxes, without a warning."""
    with drawing.style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts_for_asia()]}):
            return drawing.rendered(plot_own_picture(picture, answers), "png", {"Software": None})


def fonts_for_asia() -> list[str]:
    """Installed fonts with Chinese, Japanese and Korean letters, for names of files."""
    known = (
        "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Source Han Sans", "IPAGothic",
        "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC", "Yu Gothic", "MS Gothic",
        "Microsoft YaHei", "Malgun Gothic", "Apple SD Gothic Neo", "Droid Sans Fallback",
    )  # fmt: skip
    installed = set(matplotlib.font_manager.get_font_names())
    return [font for font in known if font in installed]


def say_answers(picture: OwnPicture, answers: Answers, share: float) -> str:
    """What the networks say of a picture, in one line."""
    said = []
    for answer in answers.by_network:
        said.append(f"{answer.network.title} {', '.join(answer.says())}")
    line = f"{picture.path}: {'; '.join(said)}"
    if answers.is_unlike:
        line += f" (unlike what the networks learnt: stranger than {share:.0%} of the test images)"
    if picture.frames > 1:
        line += f" (the first of {picture.frames} frames)"
    return line


def say_how_often_warned(familiarity: Familiarity) -> str:
    """What a warning is worth, and what it is worth that there is none."""
    kinds = [f"{100 * (1 - familiarity.share):.2g} % of the test images"]
    kinds += [f"{told:.0f} % of {kind}" for kind, told in familiarity.told.items()]
    return (
        f"Such a warning is given of {', '.join(kinds)}. Where there is none, a picture may still "
        "be of something else: these networks know these classes alone."
    )


def plot_own_picture(picture: OwnPicture, answers: Answers) -> Figure:
    """The picture, what the networks see of it, and their Grad-CAM and answers."""
    shown = picture.path.name if len(picture.path.name) <= 24 else f"{picture.path.name[:23]}…"
    seen = "as the networks see it"
    if answers.is_unlike:
        seen += "\n(unlike what they learnt)"
    row = [Picture(picture.square, shown.replace("$", r"\$")), Picture(picture.small, seen)]
    for answer in answers.by_network:
        lines = [f"{answer.network.title}:", *answer.says()]
        heat = drawing.overlay(picture.square, answer.heatmap, size=len(picture.square))
        row.append(Picture(heat, "\n".join(lines), answer.network.colour))
    return drawing.plot_pictures([[PictureBlock("", [row])]], heat_scale=True)
