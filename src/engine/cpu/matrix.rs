//! Matrix views and the one product everything is made of, over `faer`.

use faer::linalg::matmul;
use faer::{Accum, MatRef, Par};

use super::workers::Parallelism;

/// Columns, or rows where there are more of them, that one task takes. A product is cut the same way for every number
/// of threads, so that its bits do not depend on it.
const BLOCK: usize = 192;

/// A matrix in borrowed memory.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a>(MatRef<'a, f32>);

impl<'a> Mat<'a> {
    /// The first `rows · cols` values, row after row.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `row_stride` values apart: some columns of a wider matrix.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self(MatRef::from_row_major_slice_with_stride(data, rows, cols, row_stride))
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self(self.0.transpose())
    }
}

/// A matrix to write into.
pub(super) struct MatMut<'a>(faer::MatMut<'a, f32>);

impl<'a> MatMut<'a> {
    /// The first `rows · cols` values, row after row.
    pub(super) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `row_stride` values apart.
    pub(super) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        // The row-major constructor of faer 0.24.4 takes the stride for that of the columns.
        Self(faer::MatMut::from_column_major_slice_with_stride_mut(data, cols, rows, row_stride).transpose_mut())
    }
}

fn check_extent(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(row_stride >= cols, "rows of {cols} values overlap at a stride of {row_stride}");
    assert!(
        rows == 0 || len >= (rows - 1) * row_stride + cols,
        "{len} values do not hold {rows} rows of {cols} at a stride of {row_stride}"
    );
}

/// What the product does with the values already there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    /// Replace them.
    Set,
    /// Add to them.
    Add,
}

/// `dst = scale · a · b`, or `dst += scale · a · b`, with the same bits for every number of threads.
pub(super) fn matmul(dst: MatMut<'_>, into: Into, scale: f32, a: Mat<'_>, b: Mat<'_>, threads: Parallelism) {
    let (dst, a, b) = (dst.0, a.0, b.0);
    assert!(
        dst.nrows() == a.nrows() && dst.ncols() == b.ncols() && a.ncols() == b.nrows(),
        "[{}, {}] is not the product of [{}, {}] and [{}, {}]",
        dst.nrows(),
        dst.ncols(),
        a.nrows(),
        a.ncols(),
        b.nrows(),
        b.ncols()
    );
    let accum = match into {
        Into::Set => Accum::Replace,
        Into::Add => Accum::Add,
    };
    // A product is the transpose of the transposes' product: cut along the columns, whichever those are.
    let (dst, a, b) =
        if dst.nrows() > dst.ncols() { (dst.transpose_mut(), b.transpose(), a.transpose()) } else { (dst, a, b) };
    in_blocks(dst, accum, scale, a, b, threads);
}

fn in_blocks(
    dst: faer::MatMut<'_, f32>,
    accum: Accum,
    scale: f32,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    threads: Parallelism,
) {
    if dst.ncols() <= BLOCK {
        return matmul::matmul(dst, accum, a, b, scale, Par::Seq);
    }
    let middle = dst.ncols().div_ceil(2).next_multiple_of(BLOCK);
    let (left, right) = dst.split_at_col_mut(middle);
    let (b_left, b_right) = b.split_at_col(middle);
    let left = || in_blocks(left, accum, scale, a, b_left, threads);
    let right = || in_blocks(right, accum, scale, a, b_right, threads);
    match threads {
        Parallelism::None => (left(), right()),
        Parallelism::Rayon => rayon::join(left, right),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_with_strides_match_the_definition() {
        let a: Vec<f32> = (0..3 * 7).map(|i| (i as f32 * 0.37).sin()).collect();
        let w: Vec<f32> = (0..4 * 9).map(|i| (i as f32 * 0.71).cos()).collect();
        let mut c = vec![1.0f32; 3 * 6];
        // c[:, 0..4] += 2 · a[:, 0..5] · w[:, 0..5]ᵀ
        matmul(
            MatMut::strided(&mut c, 3, 4, 6),
            Into::Add,
            2.0,
            Mat::strided(&a, 3, 5, 7),
            Mat::strided(&w, 4, 5, 9).t(),
            Parallelism::None,
        );
        for r in 0..3 {
            for n in 0..4 {
                let dot: f64 = (0..5).map(|k| f64::from(a[r * 7 + k]) * f64::from(w[n * 9 + k])).sum();
                assert!((f64::from(c[r * 6 + n]) - (1.0 + 2.0 * dot)).abs() < 1e-5);
            }
            assert_eq!(c[r * 6 + 4..r * 6 + 6], [1.0, 1.0], "columns outside the view are left alone");
        }
    }

    #[test]
    fn setting_ignores_what_was_there() {
        let mut c = vec![f32::NAN; 4];
        let one = [1.0, 0.0, 0.0, 1.0];
        matmul(
            MatMut::new(&mut c, 2, 2),
            Into::Set,
            1.0,
            Mat::new(&one, 2, 2),
            Mat::new(&one, 2, 2),
            Parallelism::None,
        );
        assert_eq!(c, one);
    }

    #[test]
    fn products_do_not_depend_on_the_number_of_threads() {
        // Cut along columns and along rows, into one block and into several, with edges that fill no tile.
        for (m, n, k) in [(533, 259, 131), (50, 1030, 1500), (1, 2050, 700), (700, 3, 900)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).cos()).collect();
            let product = |threads: Parallelism| {
                let mut c = vec![f32::NAN; m * n];
                let (a, w) = (Mat::new(&a, m, k), Mat::new(&w, n, k).t());
                matmul(MatMut::new(&mut c, m, n), Into::Set, 1.0, a, w, threads);
                c
            };
            let one = product(Parallelism::None);
            for threads in [1, 2, 3, 8] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let many = pool.install(|| product(Parallelism::Rayon));
                assert!(many == one, "[{m}, {k}] x [{k}, {n}] on {threads} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not hold")]
    fn a_view_larger_than_its_slice_is_refused() {
        Mat::new(&[0.0; 5], 2, 3);
    }
}
