"""report.html: the run as one page that opens anywhere, and is mailed as it is.

In come results and the figures that were drawn; out comes the page, with its pictures, its data and
its script inside. Nothing is fetched, and no text of other people's is ever markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from lab.measure.failures import Transition
from lab.measure.gallery import Gallery
from lab.measure.showcase import AttackShown, Showcase, Shown
from lab.report import drawing
from lab.report.drawing import in_file
from lab.report.headline import Headline
from lab.report.results import Results
from lab.report.summary import Part, ShownTable, Topic
from lab.report.tables import bound_of

HERE = Path(__file__).with_name("page_parts")
EXTRAS = {
    Topic.CONFUSIONS: "confusions.html",
    Topic.STRESS: "stress.html",
    Topic.FAILURES: "failures.html",
}
# Figures that the page has better: the first as SVG, the others to be touched
REPLACED = ("accuracy_comparison", "confusion_matrix_", "corruptions", "failure_cases")
LOSSLESS = 2000  # images in a sprite; more are kept a little coarser, so that pages can be mailed


# ---- What stands in templates


@dataclass(frozen=True)
class Cell:
    text: str
    value: str  # what the column is sorted by; "" where there is no number


@dataclass(frozen=True)
class Row:
    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class PageTable:
    caption: str
    headings: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class PageFigure:
    source: str
    shows: str


@dataclass(frozen=True)
class PagePart:
    anchor: str
    heading: str
    sentences: Sequence[str]
    extra: str  # the template of what can be touched; "" where there is none
    tables: Sequence[PageTable]
    figures: Sequence[PageFigure]


def report(
    results: Results,
    head: Headline,
    told: Sequence[Part],
    accuracy: bytes,
    figures: Mapping[str, bytes],
) -> str:
    """The page of what is `told`, with the `accuracy` figure as SVG, and plots/'s PNG by name."""
    parts = [page_part(part, figures) for part in told]
    gallery = None if results.failures is None else results.failures.gallery
    showcase = None if results.stress is None else results.stress.showcase
    networks = [of_network.network for of_network in results.networks]
    return rendered(
        "report.html",
        title=results.dataset,
        headline=head,
        accuracy=data_address(accuracy, "image/svg+xml"),
        parts=parts,
        classes=results.classes,
        networks=networks,
        confusions=list(confusions_of(results)),
        transitions=list(transitions_of(results)),
        ways=[str(way) for way in Transition if way is not Transition.RIGHT],
        has_people=gallery is not None and gallery.people is not None,
        showcase=None if showcase is None else showcase_of(showcase, results),
        data=as_data(gallery_data(gallery, results)),
    )


def rendered(template: str, **values: Any) -> str:
    """A template with the page's style and script, which alone its security policy lets run."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src {hash_of(style)}; "
        f"script-src {hash_of(script)}"
    )
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(template)
    return page.render(policy=policy, style=style, script=script, **values)


def hash_of(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def as_data(value: Any) -> str:
    """JSON that can stand in a script element: it holds no "<"."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def data_address(content: bytes, kind: str) -> str:
    """The address of a file that lies in the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- Parts


def page_part(part: Part, figures: Mapping[str, bytes]) -> PagePart:
    """A part of the summary with its pictures."""
    shown = []
    for figure in part.figures:
        if figure.name in figures and not figure.name.startswith(REPLACED):
            source = data_address(figures[figure.name], "image/png")
            shown.append(PageFigure(source, figure.shows))
    return PagePart(
        anchor=part.topic.name.lower(),
        heading=str(part.topic),
        sentences=part.sentences,
        extra=EXTRAS.get(part.topic, ""),
        tables=[page_table(table) for table in part.tables],
        figures=shown,
    )


def page_table(shown: ShownTable) -> PageTable:
    """A table's texts, each with the number that it is sorted by."""
    table = shown.table
    texts = table.texts()
    rows = []
    for k, name in enumerate(table.names):
        cells = []
        for j, column in enumerate(table.columns):
            value = bound_of(column.numbers[k], "value")
            cells.append(Cell(texts.iloc[k, j], "" if value is None else repr(float(value))))
        rows.append(Row(name, cells))
    return PageTable(shown.caption, [table.heading, *texts.columns], rows)


def confusions_of(results: Results) -> Iterator[dict[str, Any]]:
    """Each network's confusion matrix of the first seed."""
    for of_network in results.networks:
        network = of_network.network
        rows = of_network.runs[0].confusion.tolist()
        yield {"title": network.title, "key": network.key, "rows": rows}


def transitions_of(results: Results) -> Iterator[dict[str, Any]]:
    """What becomes of mistakes from the first network to each other, with the first seed."""
    if results.failures is None:
        return
    for one in results.failures.transitions:
        bars = []
        for way, counts in one.counts.items():
            if way is not Transition.RIGHT:
                bars.append({"way": str(way), "count": int(counts[0])})
        titles = {"first": one.first.title, "title": one.network.title}
        yield {**titles, "key": one.network.key, "bars": bars}


# ---- Failures


def gallery_data(gallery: Gallery | None, results: Results) -> dict[str, Any]:
    """What the page's script knows of the images; probabilities are in thousandths."""
    networks = []
    for of_network in results.networks:
        network = of_network.network
        networks.append({"key": network.key, "title": network.title, "colour": network.colour})
    data: dict[str, Any] = {"classes": list(results.classes), "networks": networks}
    data["ways"] = {
        "corrected": str(Transition.CORRECTED),
        "broken": str(Transition.BROKEN),
        "same": str(Transition.SAME_CLASS),
        "differs": str(Transition.OTHER_CLASS),
    }
    if gallery is None:
        return {**data, "index": []}
    data["index"] = gallery.index.tolist()
    data["labels"] = gallery.labels.tolist()
    data["suspect"] = gallery.is_suspect.astype(int).tolist()
    return {**data, **answers_data(gallery), **people_data(gallery), **pictures_data(gallery)}


def answers_data(gallery: Gallery) -> dict[str, Any]:
    """Each network's answers."""
    chances = {}
    predicted = {}
    confidence = {}
    for key, probabilities in gallery.probabilities.items():
        chances[key] = thousandths(probabilities)
        predicted[key] = probabilities.argmax(1).tolist()
        confidence[key] = thousandths(probabilities.max(1))
    return {"chances": chances, "predicted": predicted, "confidence": confidence}


def people_data(gallery: Gallery) -> dict[str, Any]:
    """People's answers, and how many choose the label."""
    people = gallery.people
    if people is None:
        return {"people": None, "agreement": None}
    at_label = people[np.arange(len(people)), gallery.labels]
    return {"people": thousandths(people), "agreement": thousandths(at_label)}


def pictures_data(gallery: Gallery) -> dict[str, Any]:
    """The images in one picture, Grad-CAM in bytes, and the colours of these."""
    columns = max(1, math.ceil(math.sqrt(len(gallery.index))))
    sprite, kind = sprite_of(gallery.pixels, columns)
    heatmaps = {}
    shape: tuple[int, ...] = (1, 1)
    for key, heat in gallery.heatmaps.items():
        shape = heat.shape[1:]
        in_bytes = (255 * heat).round().astype(np.uint8).tobytes()
        heatmaps[key] = base64.b64encode(in_bytes).decode()
    colours = (255 * drawing.HEAT_COLOURS(np.arange(256))[:, :3]).round().astype(int)
    return {
        "columns": columns,
        "sprite": base64.b64encode(sprite).decode(),
        "spriteKind": kind,
        "heatmaps": heatmaps,
        "heatShape": shape,
        "colours": colours.tolist(),
    }


def thousandths(shares: np.ndarray) -> list[int]:
    return (1000 * shares).round().astype(int).ravel().tolist()


def sprite_of(pixels: np.ndarray, columns: int) -> tuple[bytes, str]:
    """Images uint8 [K, 32, 32, 3] in rows of so many, as one picture's file, and its kind."""
    count, height, width, _ = pixels.shape
    rows = max(1, -(-count // columns))
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = pixels
    tiled = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    picture = Image.fromarray(tiled.reshape(rows * height, columns * width, 3))
    if count <= LOSSLESS:
        return in_file(picture, "PNG"), "image/png"
    return in_file(picture, "JPEG", quality=90, subsampling=0), "image/jpeg"


# ---- One image under corruption and attack


def showcase_of(showcase: Showcase, results: Results) -> dict[str, Any]:
    """Rows of pictures with their answers."""
    titles = {one.network.key: one.network.title for one in results.networks}
    corrupted = []
    for name, of_severities in showcase.corrupted.items():
        images = [page_shown(shown, showcase.label, titles, results) for shown in of_severities]
        corrupted.append({"name": name.replace("_", " "), "images": images})
    attacked = []
    epsilons: list[str] = []
    for key, by_epsilon in showcase.attacked.items():
        images = []
        for one in by_epsilon:
            shown = page_shown(one.shown, showcase.label, titles, results)
            images.append({**shown, "change": picture_of_change(one)})
        attacked.append({"name": titles[key], "images": images})
        epsilons = [f"{one.epsilon:g}/255" for one in by_epsilon]
    return {
        "index": showcase.index,
        "label": results.classes[showcase.label],
        "networks": ", ".join(titles.values()),
        "corrupted": corrupted,
        "attacked": attacked,
        "epsilons": epsilons,
    }


def page_shown(
    shown: Shown, label: int, titles: Mapping[str, str], results: Results
) -> dict[str, Any]:
    """A picture and what each network says of it."""
    said = []
    for key, answer in shown.said.items():
        name = results.classes[answer.predicted]
        text = f"{name} {answer.confidence:.0%}"
        is_wrong = answer.predicted != label
        said.append({"title": titles[key], "text": text, "is_wrong": is_wrong})
    alt = "; ".join(f"{one['title']}: {one['text']}" for one in said)
    return {"source": picture_address(shown.pixels), "alt": alt, "said": said, "change": ""}


def picture_of_change(one: AttackShown) -> str:
    """Grey is no change."""
    pixels = (127.5 + 127.5 * one.change.clip(-1, 1)).round().astype(np.uint8)
    return picture_address(pixels)


def picture_address(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as the address of a PNG in the page."""
    return data_address(in_file(Image.fromarray(pixels), "PNG"), "image/png")


# ---- Pictures of one's own


@dataclass(frozen=True)
class OwnAnswer:
    """What a network says of somebody's picture."""

    title: str
    says: str
    heat: str  # the address of the picture with its Grad-CAM


@dataclass(frozen=True)
class OwnPicture:
    """Somebody's picture on the page; pictures are addresses."""

    name: str
    square: str
    small: str
    is_unlike: bool
    answers: Sequence[OwnAnswer]


def own_pictures(pictures: Sequence[OwnPicture], share: float, warning: str) -> str:
    """The page of --predict; `share` of the test images are less strange than what is warned of."""
    return rendered(
        "pictures.html",
        title="What the networks say of these pictures",
        pictures=pictures,
        share=f"{share:.0%}",
        warning=warning,
    )


def photo_address(pixels: np.ndarray, side: int = 256) -> str:
    """uint8 [S, S, 3], no larger than is shown, as the address of a JPEG in the page."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    return data_address(in_file(picture, "JPEG", quality=88), "image/jpeg")
