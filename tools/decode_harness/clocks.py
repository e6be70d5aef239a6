#!/usr/bin/env python3
"""Writes kernels/persistent* with marks into a folder: clocks of one thread, in the middle layer of every step and in the
flow before it.

    clocks.py DIR [THREAD]

A mark is a clock and a store; all together they add 4 KB to the code and an eighth to the time, or more where the code
then no longer fits the instruction caches. The lines they stand behind
are named below; one that is not there any more is an error. THREAD is the thread that is looked at (0; 128 is the first of
the second warpgroup).
"""

import pathlib
import sys

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels"

# Name, file, text, and whether the mark stands before it instead of behind. {p} is the index of a piece.
COMPUTE, FLOW = "persistent_compute.cuh", "persistent_flow.cuh"
PHASES = ["QKV", "O", "gate/up", "down"]
IN_PHASE = ["operands asked", "activations", "product", "inbox free", "sent", "received", "finished", "done"]
ATTENTION = ["keys", "queries", "multiplied", "scores", "all scores", "softmax", "all softmax", "values", "suffix", "sent", "received", "joined", "done"]
IN_FLOW = ["begin", "asked", "activations", "sent", "received", "finished", "done"]
NAMES = ["begin"] + [f"{p}: {m}" for p in PHASES for m in IN_PHASE] + [f"attention: {m}" for m in ATTENTION] + [f"flow: {m}" for m in IN_FLOW]


def mark(phase: str, name: str) -> int:
    return NAMES.index(f"{phase}: {name}")


def flow_edits() -> list[tuple[str, str]]:
    at = {m: mark("flow", m) for m in IN_FLOW}
    wait, received = "        barrier_wait(&s.acts_full[0], acts_parity);\n", "                barrier_wait(&s.x_received, step & 1);\n"
    return [
        (wait, f"        MARK({at['asked']});\n{wait}        MARK({at['activations']});\n"),
        ("        if (last) return;\n", f"        MARK({at['sent']});\n        if (last) return;\n"),
        (received, f"{received}                MARK({at['received']});\n"),
        ("        fence_async_shared();\n", f"        MARK({at['finished']});\n        fence_async_shared();\n"),
    ]


def edits() -> list[tuple[str, str]]:
    at = {m: IN_PHASE.index(m) for m in IN_PHASE}
    att = {m: mark("attention", m) for m in ATTENTION}
    gate = {m: mark("gate/up", m) for m in IN_PHASE}
    return [
        ("            auto operands = before(span);\n", f"            auto operands = before(span);\n            MARK(phase + {at['operands asked']});\n"),
        ("            after(operands);\n", f"            MARK(phase + {at['activations']});\n            after(operands);\n"),
        ("            product<CHUNKS, EACH>(acc, 0, pieces, [&] { pass_turn(u, tiles.units, pieces); });\n", f"            product<CHUNKS, EACH>(acc, 0, pieces, [&] {{ pass_turn(u, tiles.units, pieces); }});\n            MARK(phase + {at['product']});\n"),
        ("            send_sums(acc, span.last - span.first);\n",
         f"            MARK(phase + {at['inbox free']});\n            send_sums(acc, span.last - span.first);\n            MARK(phase + {at['sent']});\n"),
        ("            finish(span, operands);\n",
         f"            MARK(phase + {at['received']});\n            finish(span, operands);\n            MARK(phase + {at['finished']});\n"),
        ("            product<1, 2>(acc, 0, kWidth / kChunk, [&] { pass_turn(u, tiles.units, kWidth / kChunk); });\n",
         f"            MARK({gate['operands asked']});\n            product<1, 2>(acc, 0, kWidth / kChunk, [&] {{ pass_turn(u, tiles.units, kWidth / kChunk); }});\n            MARK({gate['product']});\n"),
        ("            if (u == 0) meet(6, kComputing);\n", f"            if (u == 0) meet(6, kComputing);\n            MARK({gate['received']});\n"),
        ("        acts_parity ^= 1;\n    }\n\n    // Adds the scores of 16", f"        MARK({gate['finished']});\n        acts_parity ^= 1;\n    }}\n\n    // Adds the scores of 16"),
        ("            if (batch == 0) barrier_wait(&s.queries_full, groups & 1);\n",
         f"            if (batch == 0) {{\n                MARK({att['keys']});\n                barrier_wait(&s.queries_full, groups & 1);\n                MARK({att['queries']});\n            }}\n"),
        ("        ring.skip(c.pieces);\n", f"        MARK({att['multiplied']});\n        ring.skip(c.pieces);\n"),
        ("        meet(1, kComputing);\n        if (threadIdx.x == 0) barrier_arrive(&s.queries_free, 1);\n",
         f"        MARK({att['scores']});\n        meet(1, kComputing);\n        MARK({att['all scores']});\n        if (threadIdx.x == 0) barrier_arrive(&s.queries_free, 1);\n"),
        ("        meet(1, kComputing);\n    }\n    __device__ __forceinline__ static float over_warps_max",
         f"        MARK({att['softmax']});\n        meet(1, kComputing);\n        MARK({att['all softmax']});\n    }}\n    __device__ __forceinline__ static float over_warps_max"),
        ("            weigh<1>(o, b, c, b.values, c.pieces * kKeys, tiles, w8 * 32);\n",
         f"            MARK({att['values']});\n            weigh<1>(o, b, c, b.values, c.pieces * kKeys, tiles, w8 * 32);\n            MARK({att['suffix']});\n"),
        ("            barrier_wait(&s.parts_received, parity);\n",
         f"            MARK({att['sent']});\n            barrier_wait(&s.parts_received, parity);\n            MARK({att['received']});\n"),
        ("            meet(1, kComputing);\n            if (all < kRanks && row0",
         f"            MARK({att['joined']});\n            meet(1, kComputing);\n            if (all < kRanks && row0"),
        ("                    if constexpr (U::kFew) qkv_whole(w, i / 2);\n",
         f"                    phase = {mark('QKV', IN_PHASE[0])};\n                    MARK(0);\n                    if constexpr (U::kFew) qkv_whole(w, i / 2);\n"),
        ("            float sum[4 * kQkv] = {};\n", f"            MARK(phase + {at['operands asked']});\n            float sum[4 * kQkv] = {{}};\n"),
        ("            ring.skip(kQuarter);\n", f"            MARK(phase + {at['product']});\n            ring.skip(kQuarter);\n"),
        ("            const float rinv = s.inverse_rms[n];\n", f"            MARK(phase + {at['received']});\n            const float rinv = s.inverse_rms[n];\n"),
        ("            __syncwarp();\n        }\n        acts_parity", f"            __syncwarp();\n            MARK(phase + {at['finished']});\n        }}\n        acts_parity"),
        ("                    attention();\n", f"                    MARK({mark('QKV', 'done')});\n                    attention();\n"),
        ("                    done(kQuarters, queries, kHeads / kRanks * rows);\n",
         f"                    done(kQuarters, queries, kHeads / kRanks * rows);\n                    MARK({att['done']});\n"),
        ("                    done(kQuarters, tiles, kMlpTiles / kRanks);\n",
         f"                    done(kQuarters, tiles, kMlpTiles / kRanks);\n                    MARK({gate['done']});\n"),
        ("                residual(init ? a.steps", f"                phase = mlp ? {mark('down', IN_PHASE[0])} : {mark('O', IN_PHASE[0])};\n                residual(init ? a.steps"),
        ("            begin();\n            Flow(", f"            MARK({mark('flow', 'begin')});\n            begin();\n            Flow("),
        ("            if (step == a.step_count) break;\n            done();\n",
         f"            if (step == a.step_count) break;\n            done();\n            MARK({mark('flow', 'done')});\n"),
        ("                         (init ? 2 : mlp ? 8 : 4) / U::kChunks, init, !init && !mlp);\n                done();\n",
         f"                         (init ? 2 : mlp ? 8 : 4) / U::kChunks, init, !init && !mlp);\n                done();\n                MARK(phase + {at['done']});\n"
         "                if (i / 2 == a.layer_count / 2 && mlp && threadIdx.x == kMarked)\n"
         "                    for (int m = 0; m < kMarks; m++) clocks_of[blockIdx.x][m] = s.clocks[m];\n"),
        ("struct Compute {\n", "struct Compute {\n    int phase = 0;\n"),
    ]


def replace(text: str, old: str, new: str, file: str) -> str:
    if text.count(old) != 1:
        sys.exit(f"clocks.py: {file} has {text.count(old)} times, not once:\n{old}")
    return text.replace(old, new)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    to = pathlib.Path(sys.argv[1])
    to.mkdir(parents=True, exist_ok=True)
    thread = int(sys.argv[2]) if len(sys.argv) == 3 else 0
    for source in [*KERNELS.glob("persistent*"), KERNELS / "common.cuh", KERNELS / "operands.cuh"]:
        text = source.read_text()
        for old, new in edits() if source.name == COMPUTE else flow_edits() if source.name == FLOW else []:
            text = replace(text, old, new, source.name)
        if source.name == "persistent.cuh":
            names = ", ".join(f'"{n}"' for n in NAMES)
            text = replace(text, "for QKV in one block\n};", "for QKV in one block\n    uint32_t clocks[kMarks];\n};", source.name)
            text = replace(
                text, "template <class U>\nstruct Shared {\n",
                f"constexpr int kMarks = {len(NAMES)}, kFlowMarks = {mark('flow', 'begin')}, kMostBlocks = 264, kMarked = {thread};\n"
                f"static const char* const kNames[] = {{{names}}};\n"
                "__device__ uint32_t clocks_of[kMostBlocks][kMarks];\n"
                "#define MARK(i) do { if (threadIdx.x == kMarked) s.clocks[i] = clock_now(); } while (0)\n"
                '__device__ __forceinline__ uint32_t clock_now() {\n    uint32_t c;\n    asm volatile("mov.u32 %0, %%clock;" : "=r"(c)::"memory");\n    return c;\n}\n'
                "template <class U>\nstruct Shared {\n", source.name)
        (to / source.name).write_text(text)


if __name__ == "__main__":
    main()
