"""A moving picture of the simulated arm: poses are noted while it runs, and drawn when there is time, at the end."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from sim_arm import picture_model, png_chunk

import mujoco  # isort: skip, for sim_arm chooses the renderer

RATE_HZ = 8.0
WIDTH, HEIGHT = 400, 300
COLOURS = 127  # beside the transparent one
LONGEST = 400  # frames


class Film:
    """Poses with a caption each."""

    def __init__(self, rate_hz: float = RATE_HZ):
        self.rate_hz = rate_hz
        self._frames: list[tuple[np.ndarray, str]] = []
        self._next = 0.0

    def add(self, seconds: float, qpos: np.ndarray, caption: str) -> None:
        """To be called often; takes a frame when one is due."""
        if seconds >= self._next and len(self._frames) < LONGEST:
            self._frames.append((qpos.copy(), caption))
            self._next = max(self._next + 1.0 / self.rate_hz, seconds)

    def render(self, model_path: Path) -> np.ndarray:
        """[frames, HEIGHT, WIDTH, 3], from outside, with shadows and smooth edges; from the first caption on, if any."""
        first = next((i for i, (_, caption) in enumerate(self._frames) if caption), 0)
        frames = self._frames[first:]
        model = picture_model(model_path, WIDTH, HEIGHT, shadows=1024, samples=4)
        data = mujoco.MjData(model)
        gl = mujoco.GLContext(WIDTH, HEIGHT)
        gl.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        scene, option = mujoco.MjvScene(model, 2000), mujoco.MjvOption()
        camera = mujoco.MjvCamera()
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera("scene").id
        whole = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        images = np.empty((len(frames), HEIGHT, WIDTH, 3), np.uint8)
        for image, (qpos, caption) in zip(images, frames):
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            mujoco.mjv_updateScene(model, data, option, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            mujoco.mjr_render(whole, scene, context)
            if caption:
                place, font = mujoco.mjtGridPos.mjGRID_TOPLEFT, mujoco.mjtFont.mjFONT_NORMAL
                mujoco.mjr_overlay(font, place, whole, caption, "", context)
            mujoco.mjr_readPixels(image, None, whole, context)
        context.free()
        gl.free()
        return images[:, ::-1]

    def write(self, path: Path, model_path: Path) -> None:
        """Nothing if there is no frame."""
        if not self._frames:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(animation(self.render(model_path), self.rate_hz))


def animation(images: np.ndarray, rate_hz: float) -> bytes:
    """[frames, height, width, 3] as an animated PNG: one palette, and of every frame only what changed."""
    palette, indices = quantised(images)
    frames, height, width = indices.shape
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))]
    parts.append(png_chunk(b"acTL", struct.pack(">II", frames, 0)))
    # Colour 0 is transparent: what was there before stays.
    parts.append(png_chunk(b"PLTE", bytes(3) + palette.tobytes()))
    parts.append(png_chunk(b"tRNS", bytes(1)))
    number = 0
    for k, frame in enumerate(indices):
        top, left, part = (0, 0, frame) if k == 0 else changed(indices[k - 1], frame)
        # Shown for so many milliseconds, left as it is, drawn over the frame before.
        how = (round(1e3 / rate_hz), 1000, 0, int(k > 0))
        parts.append(png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, part.shape[1], part.shape[0], left, top, *how)))
        rows = np.hstack([np.zeros((len(part), 1), np.uint8), part]).tobytes()
        body = zlib.compress(rows, 9)
        parts.append(png_chunk(b"IDAT", body) if k == 0 else png_chunk(b"fdAT", struct.pack(">I", number + 1) + body))
        number += 1 if k == 0 else 2
    return b"".join([*parts, png_chunk(b"IEND", b"")])


def changed(before: np.ndarray, after: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Where the smallest rectangle with every change begins, and what is in it: 0 where nothing changed."""
    other = before != after
    rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
    if not len(rows):
        return 0, 0, np.zeros((1, 1), np.uint8)
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return int(rows[0]), int(columns[0]), np.where(other, after, 0)[box].astype(np.uint8)


def quantised(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COLOURS colours [n, 3] and for every pixel the number of its colour, counted from 1. k-means over all frames."""
    bits = 6
    coarse = (images >> (8 - bits)).astype(np.uint32)
    codes = (coarse[..., 0] << 2 * bits) | (coarse[..., 1] << bits) | coarse[..., 2]
    known, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    mask, half = (1 << bits) - 1, 1 << (7 - bits)
    points = np.stack([known >> 2 * bits, known >> bits & mask, known & mask], -1).astype(np.float32) * (1 << (8 - bits)) + half
    # A colour of few pixels counts more than its share, or blocks and rings would fade.
    weights = np.sqrt(counts).astype(np.float32)
    centres = points[np.argsort(-weights)[np.linspace(0, len(points) - 1, min(COLOURS, len(points))).astype(int)]]
    for _ in range(12):
        nearest = closest(points, centres)
        total = np.bincount(nearest, weights, len(centres))
        for c in range(3):
            moved = np.bincount(nearest, weights * points[:, c], len(centres))
            centres[:, c] = np.where(total > 0, moved / np.maximum(total, 1e-9), centres[:, c])
    nearest = closest(points, centres)
    return np.rint(centres).clip(0, 255).astype(np.uint8), (nearest[inverse].reshape(codes.shape) + 1).astype(np.uint8)


def closest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.argmin((centres**2).sum(-1) - 2 * points @ centres.T, 1)
