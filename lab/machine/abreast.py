"""Small images convolved abreast: one convolution over rows of several images each.

In come images [B, C, H, W] and a 3x3 convolution that keeps their size; out come the same answers.

With AMX, oneDNN sums the gradient of the weights along rows, 32 pixels at a time, and rows of 3 to
8 pixels waste most of that. (With AVX512-BF16 alone it does not pay: a step would take 1 to 4 %
longer, on a Zen 4.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

PIXELS_AT_ONCE = 32  # of a row, in one tile of AMX
MOST_ABREAST = 20


def convolve(images: Tensor, convolution: Callable[[Tensor], Tensor]) -> Tensor:
    """What `convolution` makes of images [B, C, H, W]: [B, C', H, W].

    A column of zeros keeps neighbours apart.
    """
    count, _, height, width = images.shape
    abreast = images_abreast(count, width)
    # 1. Take `abreast` images at a time, and put their rows in a line.
    groups = images.permute(0, 2, 3, 1).unflatten(0, (-1, abreast))  # [B/n, n, H, W, C]
    rows = groups.transpose(1, 2)  # [B/n, H, n, W, C]
    # 2. Add a column of zeros at the right of each image, and join them.
    spaced = F.pad(rows, (0, 0, 0, 1))  # [B/n, H, n, W + 1, C]
    wide = spaced.flatten(2, 3).permute(0, 3, 1, 2)  # [B/n, C, H, n (W + 1)]
    # 3. Convolve.
    answers = convolution(wide).permute(0, 2, 3, 1)  # [B/n, H, n (W + 1), C']
    # 4. Take the images apart again, without the columns between them.
    rows = answers.unflatten(2, (abreast, -1))[..., :width, :]  # [B/n, H, n, W, C']
    # 5. Put them back in their order.
    return rows.transpose(1, 2).reshape(count, height, width, -1).permute(0, 3, 1, 2)


def images_abreast(count: int, width: int) -> int:
    """How many of `count` images to lay in a row: the divisor that wastes least.

    A row of n images has n (width + 1) pixels.
    """

    def work_per_image(abreast: int) -> float:
        return math.ceil(abreast * (width + 1) / PIXELS_AT_ONCE) / abreast

    divisors = [n for n in range(1, MOST_ABREAST + 1) if count % n == 0]
    return min(divisors, key=work_per_image)
