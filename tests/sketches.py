"""Figures that are empty, for tests that are not about them: drawing takes most of a small run."""

import io

from matplotlib.figure import Figure

from lab.report import drawing


def sketch(set_attribute=setattr):
    """From here on figures are laid out without their pictures, and their files are empty."""
    set_attribute(drawing, "draw_block", lambda *_: None)
    set_attribute(drawing, "rendered", sketched)


def sketched(figure, file_type, without):
    """In place of `drawing.rendered`: a file of the figure's size that shows nothing."""
    buffer = io.BytesIO()
    empty = Figure(figsize=figure.get_size_inches())
    empty.savefig(buffer, format=file_type, dpi=20, metadata=without)
    return buffer.getvalue()
