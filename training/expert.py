"""The demonstrator: inverse kinematics in closed form, and a field that says where to move from any pose.

The field depends on the pose alone, not on how the arm came there, so every pose that noise or the policy's own errors
lead to has its right answer. All functions work on arrays with any leading dimensions.

A hand is seven numbers: fingertip x, y, z (m, in the frame of the table), tilt of the hand from pointing up (rad; π
points straight down), yaw and roll of the wrist (rad), gripper (m).
"""

from __future__ import annotations

import numpy as np

SHOULDER = 0.21  # height of the shoulder's lift axis above the table, m, and the links above it as in sim_arm.xml
UPPER, FORE, WRIST, HAND = 0.27, 0.23, 0.085, 0.175

RATE_HZ = 20.0  # actions a second
TOUCH = 0.037  # height that the fingertip is sent to: 8 mm into a block of 45 mm, so that an error of millimetres still touches
CLEAR = 0.075  # so much higher while it is not above the block
NEAR = 0.010  # within so far from the block's middle it is sent all the way down, m
SLOPE = 2.0  # of the funnel from there outwards
SPEED = 0.22  # m/s across
DOWN, UP = 0.15, 0.22  # m/s
CREEP = 0.03  # m/s: the slowest, so that it arrives
GAIN = 4.0  # 1/s
TILT, GRIPPER = np.pi, 0.004
SUBSTEPS = 4


def hand_of(joints: np.ndarray) -> np.ndarray:
    """Forward kinematics."""
    pan, lift, elbow, pitch, yaw, roll, gripper = np.moveaxis(joints, -1, 0)
    tilt = lift + elbow + pitch
    along = UPPER * np.sin(lift) + FORE * np.sin(lift + elbow) + (WRIST + HAND * np.cos(yaw)) * np.sin(tilt)
    aside = -HAND * np.sin(yaw)
    z = SHOULDER + UPPER * np.cos(lift) + FORE * np.cos(lift + elbow) + (WRIST + HAND * np.cos(yaw)) * np.cos(tilt)
    x = along * np.cos(pan) - aside * np.sin(pan)
    y = along * np.sin(pan) + aside * np.cos(pan)
    return np.stack([x, y, z, tilt, yaw, roll, gripper], -1)


def joints_of(hand: np.ndarray) -> np.ndarray:
    """Inverse kinematics, elbow up; out of reach it gives the nearest stretch."""
    x, y, z, tilt, yaw, roll, gripper = np.moveaxis(hand, -1, 0)
    aside = -HAND * np.sin(yaw)
    along = np.sqrt(np.maximum(x**2 + y**2 - aside**2, 1e-6))
    pan = np.arctan2(y, x) - np.arctan2(aside, along)
    last = WRIST + HAND * np.cos(yaw)
    r, h = along - last * np.sin(tilt), z - last * np.cos(tilt) - SHOULDER
    cosine = (r**2 + h**2 - UPPER**2 - FORE**2) / (2 * UPPER * FORE)
    elbow = np.arccos(np.clip(cosine, -1.0, 1.0))
    lift = np.arctan2(r, h) - np.arctan2(FORE * np.sin(elbow), UPPER + FORE * np.cos(elbow))
    return np.stack([pan, lift, elbow, tilt - lift - elbow, yaw, roll, gripper], -1)


def velocity(hand: np.ndarray, block: np.ndarray, pace: np.ndarray) -> np.ndarray:
    """Where to move to touch the block at `block` [..., 2], times `pace` [...]: up first where the way is blocked, then
    across, then down through a funnel; the hand turns to point down meanwhile."""
    way = block - hand[..., :2]
    far = np.linalg.norm(way, axis=-1)
    wanted = TOUCH + np.clip((far - NEAR) * SLOPE, 0.0, CLEAR)
    up = wanted - hand[..., 2]
    # Too low to cross: rise before moving.
    free = np.clip(1.0 - (up - 0.008) / 0.025, 0.0, 1.0)
    across = np.minimum(SPEED, np.maximum(GAIN * far, CREEP)) * free
    out = np.empty_like(hand)
    out[..., :2] = way / np.maximum(far, 1e-6)[..., None] * np.minimum(across, far * RATE_HZ * SUBSTEPS / 2)[..., None]
    creep = np.where(up < 0, -CREEP, 0.0)
    rise = np.clip(np.where(np.abs(GAIN * up) > CREEP, GAIN * up, creep), -DOWN, UP)
    out[..., 2] = np.clip(rise, -np.abs(up) * RATE_HZ * SUBSTEPS, np.abs(up) * RATE_HZ * SUBSTEPS)
    rest = np.array([TILT, 0.0, 0.0, GRIPPER])
    most = np.array([0.8, 0.8, 1.0, 0.04])
    out[..., 3:] = np.clip(3.0 * (rest - hand[..., 3:]), -most, most)
    return out * pace[..., None]


def demonstrate(joints: np.ndarray, block: np.ndarray, pace: np.ndarray, actions: int) -> np.ndarray:
    """Joint positions `[..., actions, 7]` at RATE_HZ, the first of them `joints` itself."""
    hand = hand_of(joints)
    out = [joints]
    for _ in range(actions - 1):
        for _ in range(SUBSTEPS):
            hand = hand + velocity(hand, block, pace) / (RATE_HZ * SUBSTEPS)
        out.append(joints_of(hand))
    return np.stack(out, -2)
