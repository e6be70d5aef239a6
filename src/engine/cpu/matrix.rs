//! Matrix views and the one product everything is made of, over the crate `gemm`.

use gemm::Parallelism;

/// A matrix in borrowed memory: entry (r, c) is `data[r · row_stride + c · col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// The first `rows · cols` values, row after row.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `row_stride` values apart: some columns of a wider matrix.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose; nothing moves.
    pub(super) fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A matrix to write into; rows are `row_stride` values apart.
pub(super) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// The first `rows · cols` values, row after row.
    pub(super) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `row_stride` values apart.
    pub(super) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
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

/// `dst = scale · a · b`, or `dst += scale · a · b`. Each entry is one sum over k in a fixed order, whatever the
/// number of threads.
pub(super) fn matmul(dst: MatMut<'_>, into: Into, scale: f32, a: Mat<'_>, b: Mat<'_>, threads: Parallelism) {
    assert!(
        dst.rows == a.rows && dst.cols == b.cols && a.cols == b.rows,
        "[{}, {}] is not the product of [{}, {}] and [{}, {}]",
        dst.rows,
        dst.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    let add = into == Into::Add;
    // SAFETY: the extents of the three views were checked against their slices when they were made, the shapes agree
    // (asserted above), `dst` is exclusively borrowed and its rows do not overlap.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if add { 1.0 } else { 0.0 },
            scale,
            false,
            false,
            false,
            threads,
        );
    }
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
        // Large enough for every way `gemm` shares out its work, with edges that fill no tile.
        for (m, n, k) in [(533, 259, 131), (50, 1030, 1500), (1, 2050, 700), (700, 3, 900)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.71).cos()).collect();
            let product = |threads| {
                let mut c = vec![f32::NAN; m * n];
                let (a, w) = (Mat::new(&a, m, k), Mat::new(&w, n, k).t());
                matmul(MatMut::new(&mut c, m, n), Into::Set, 1.0, a, w, threads);
                c
            };
            let one = product(Parallelism::None);
            for threads in [2, 3, 8] {
                assert!(product(Parallelism::Rayon(threads)) == one, "[{m}, {k}] x [{k}, {n}] on {threads} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "do not hold")]
    fn a_view_larger_than_its_slice_is_refused() {
        Mat::new(&[0.0; 5], 2, 3);
    }
}
