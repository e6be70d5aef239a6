//! Softmax attention in blocks of query rows.

use super::workers::Parallelism;
use rayon::prelude::*;

use super::math::softmax_rows;
use super::matrix::{Into, Mat, MatMut, matmul};

/// Query rows one task takes; its scores stay in the cache of one core.
const BLOCK_ROWS: usize = 64;

/// Keys and values of the same rows, `[rows, heads · head_dim]` each.
#[derive(Clone, Copy)]
pub(super) struct KeyValues<'a> {
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
}

/// Heads of equal width, side by side in every row.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) count: usize,
    pub(super) dim: usize,
}

/// `out = softmax(q · kᵀ / √dim) · v` per head, over the keys of all `segments` in turn.
///
/// `q` and `out` are `[rows, count · dim]`. Multi-query attention is the case of one head with `rows · query heads`
/// rows. `scores` is scratch and grows to what is needed.
pub(super) fn attention(
    threads: Parallelism,
    heads: Heads,
    q: &[f32],
    segments: &[KeyValues<'_>],
    out: &mut [f32],
    scores: &mut Vec<f32>,
) {
    let width = heads.count * heads.dim;
    let keys: usize = segments.iter().map(|s| s.keys.len() / width).sum();
    let block = BLOCK_ROWS * width;
    let block_scores = BLOCK_ROWS * keys;
    let blocks = match threads {
        Parallelism::None => 1,
        Parallelism::Rayon => q.len().div_ceil(block),
    };
    super::grow(scores, blocks * block_scores);
    match threads {
        Parallelism::None => {
            for (q, out) in q.chunks(block).zip(out.chunks_mut(block)) {
                attend_block(heads, q, segments, keys, out, scores);
            }
        }
        Parallelism::Rayon => q
            .par_chunks(block)
            .zip(out.par_chunks_mut(block))
            .zip(scores.par_chunks_mut(block_scores))
            .for_each(|((q, out), scores)| attend_block(heads, q, segments, keys, out, scores)),
    }
}

fn attend_block(heads: Heads, q: &[f32], segments: &[KeyValues<'_>], keys: usize, out: &mut [f32], scores: &mut [f32]) {
    let Heads { count, dim } = heads;
    let width = count * dim;
    let rows = q.len() / width;
    let scale = 1.0 / (dim as f32).sqrt();
    let scores = &mut scores[..rows * keys];
    for head in 0..count {
        let columns = head * dim;
        let mut at = 0;
        for segment in segments {
            let n = segment.keys.len() / width;
            matmul(
                MatMut::strided(&mut scores[at..], rows, n, keys),
                Into::Set,
                scale,
                Mat::strided(&q[columns..], rows, dim, width),
                Mat::strided(&segment.keys[columns..], n, dim, width).t(),
                Parallelism::None,
            );
            at += n;
        }
        softmax_rows(scores, keys);
        let (mut at, mut into) = (0, Into::Set);
        for segment in segments {
            let n = segment.keys.len() / width;
            matmul(
                MatMut::strided(&mut out[columns..], rows, dim, width),
                into,
                1.0,
                Mat::strided(&scores[at..], rows, n, keys),
                Mat::strided(&segment.values[columns..], n, dim, width),
                Parallelism::None,
            );
            (at, into) = (at + n, Into::Add);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, f: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * f).sin() * 2.0).collect()
    }

    #[test]
    fn attention_matches_the_definition_and_its_split_into_segments() {
        let heads = Heads { count: 3, dim: 4 };
        let (rows, keys, width) = (70, 11, 12);
        let (q, k, v) = (wave(rows * width, 0.31), wave(keys * width, 0.73), wave(keys * width, 1.3));
        let mut expected = vec![0f32; rows * width];
        for r in 0..rows {
            for h in 0..3 {
                let dot = |j: usize| -> f64 {
                    (0..4).map(|d| f64::from(q[r * 12 + h * 4 + d] * k[j * 12 + h * 4 + d])).sum::<f64>() / 2.0
                };
                let total: f64 = (0..keys).map(|j| dot(j).exp()).sum();
                for d in 0..4 {
                    expected[r * 12 + h * 4 + d] =
                        (0..keys).map(|j| dot(j).exp() / total * f64::from(v[j * 12 + h * 4 + d])).sum::<f64>() as f32;
                }
            }
        }
        let cut = 4 * width;
        for segments in [
            vec![KeyValues { keys: &k, values: &v }],
            vec![KeyValues { keys: &k[..cut], values: &v[..cut] }, KeyValues { keys: &k[cut..], values: &v[cut..] }],
        ] {
            for threads in [Parallelism::None, Parallelism::Rayon] {
                let (mut out, mut scores) = (vec![f32::NAN; rows * width], Vec::new());
                attention(threads, heads, &q, &segments, &mut out, &mut scores);
                let worst = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 2e-6, "{worst:e}");
            }
        }
    }
}
