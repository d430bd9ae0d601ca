"""Images from pixels: an affine transform of each, and normalisation."""

import numpy as np

from nas_mnist.kernels.compilation import kernel

_ZERO, _ONE, _NEXT = np.float32(0), np.float32(1), np.uintp(1)


@kernel
def affine(pixels, chosen, matrices, gain, offset, out):
    """Fill out (H, W, N) with the chosen (B,) images of pixels (M, H, W) uint8, times `gain` less `offset`.

    `matrices` (B, 2, 3) lead from an output pixel to the input pixel it shows, both counted from the image's centre;
    bilinear, black outside. With none, (0, 2, 3), the images are as they are.
    """
    _, h, w = pixels.shape
    framed = np.zeros((h + 3, w + 3), np.float32)
    out[:, :, len(chosen) :] = 0
    for i in range(len(chosen)):
        image = pixels[chosen[i]]
        if len(matrices) > 0:
            # A black frame, and the coordinates end there: no pixel asks whether it is outside.
            framed[1 : h + 1, 1 : w + 1] = image
            _transform(framed, matrices[i], gain, offset, out, i)
            continue
        for r in range(h):
            for s in range(w):
                out[r, s, i] = np.float32(image[r, s]) * gain - offset


@kernel
def _transform(framed, m, gain, offset, out, i):
    h, w, _ = out.shape
    flat, row = framed.ravel(), np.int32(w + 3)
    half_h, half_w = np.float32((h - 1) / 2), np.float32((w - 1) / 2)
    places, rights, downs = np.empty(w, np.int32), np.empty(w, np.float32), np.empty(w, np.float32)
    for r in range(h):
        y = np.float32(r) - half_h
        for s in range(w):  # apart from the loop that reads pixels, so that it is done in vectors
            x = np.float32(s) - half_w
            u = m[0, 0] * x + m[0, 1] * y + m[0, 2] + half_w + _ONE
            v = m[1, 0] * x + m[1, 1] * y + m[1, 2] + half_h + _ONE
            u = min(max(u, _ZERO), np.float32(w + 1))
            v = min(max(v, _ZERO), np.float32(h + 1))
            left, top = np.int32(u), np.int32(v)
            places[s], rights[s], downs[s] = top * row + left, u - np.float32(left), v - np.float32(top)
        for s in range(w):
            place, right = np.uintp(places[s]), rights[s]  # unsigned: numba would ask whether it is negative
            upper = flat[place] * (_ONE - right) + flat[place + _NEXT] * right
            place += np.uintp(row)
            lower = flat[place] * (_ONE - right) + flat[place + _NEXT] * right
            out[r, s, i] = (upper * (_ONE - downs[s]) + lower * downs[s]) * gain - offset
