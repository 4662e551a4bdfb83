//! The gradient of a weight as an integer product: `dW[o][i] = Σ_t g[t][o] * x[t][i]` of int8 activations, whose codes the
//! forward pass has made already, and an incoming gradient that is quantized here.
//!
//! The sum goes over tokens, whose scales differ. So a token's scale is multiplied into its gradient first,
//! `g'[t][o] = g[t][o] * act_scale[t]`, and that is quantized with one scale for each output feature and each block of
//! [`TOKEN_BLOCK`] tokens: a block's sum of integers is exact, and exact as f32 too. Blocks are added in their order, with a
//! rounding after the product and one after the sum, since not every processor has the two in one. So results depend neither
//! on the kernel nor on the number of threads.
//!
//! Both operands are stored in panels, as [`crate::packed`]'s code vectors are, with tokens for columns: a panel is 16
//! features of a block, 32 lines of four tokens each, byte `4 f + c` being feature `f`, token `c` of the line's four. A line
//! of activations is what an instruction takes as it lies in memory, and four bytes of a gradient's line are what it takes for
//! one output feature. Bytes are interleaved once, where panels are made.

use std::cell::RefCell;

use super::{Choice, GROUP, GROUP_OUTS, Isa, Kernel, KernelError, QuantizedRows, with_isa};
use crate::packed::{Line, PANEL, STEP, interleave, zeroed};
use crate::pool::{self, Pointer};
use crate::quant::{ACT_MAX, ROUND};
use crate::simd_fn;

/// Tokens whose gradients share a scale, for each output feature.
pub const TOKEN_BLOCK: usize = 128;

/// Lines of a panel: steps of four tokens.
pub(super) const STEPS: usize = TOKEN_BLOCK / STEP;
/// Lines of a group of panels.
const GROUP_LINES: usize = GROUP * STEPS;
/// Output features of a tile at most: whole panels, and whole strips of four or six rows. With 4 groups of inputs, the
/// outputs take 96 KiB and stay in the second-level cache until all blocks are added.
pub(super) const TILE_ROWS: usize = 96;
/// Groups of input features of a tile at most.
const TILE_GROUPS: usize = 4;
/// Tiles for each thread, where smaller ones give so many.
const TASKS: usize = 4;

// Sums of a block are exact as f32, and panels of the gradient begin where tiles do.
const _: () = assert!(TOKEN_BLOCK * 127 * 128 < 1 << 24 && TILE_ROWS.is_multiple_of(PANEL));

/// What is added to codes of activations where they are stored: they are unsigned.
pub(super) const ZERO: u8 = 128;

/// Int8 codes of activations `[tokens, features]`, as [`weight_gradient`] reads them.
#[derive(Clone, Default)]
pub struct ActivationPanels {
    tokens: usize,
    features: usize,
    /// [`GROUP_LINES`] for each block and each group; codes are `x + 128`. What is stored for tokens that are not there is of no
    /// interest, since their gradient's codes are 0.
    lines: Vec<Line>,
}

impl ActivationPanels {
    /// The codes of quantized rows.
    pub fn of_codes(rows: &QuantizedRows) -> Self {
        let mut panels = Self::default();
        panels.fill(rows);
        panels
    }

    /// [`ActivationPanels::of_codes`] into buffers that are already there.
    pub fn fill(&mut self, rows: &QuantizedRows) {
        (self.tokens, self.features) = (rows.rows(), rows.columns());
        let groups = groups(self.features);
        resize(&mut self.lines, self.tokens.div_ceil(TOKEN_BLOCK) * groups * GROUP_LINES);
        pool::for_chunks(&mut self.lines, GROUP_LINES, |chunk, lines| {
            let (first, group) = (chunk / groups * TOKEN_BLOCK, chunk % groups);
            let tokens = TOKEN_BLOCK.min(self.tokens - first);
            // A group's codes of a row are one line of it.
            interleave_rows(&rows.lines_from(first)[group..], rows.stride(), tokens, lines);
        });
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Length of a token's activations.
    pub fn features(&self) -> usize {
        self.features
    }

    /// A group of panels of a block.
    fn group(&self, block: usize, group: usize) -> &[[Line; STEPS]; GROUP] {
        let (panels, _) = self.lines.as_chunks();
        &panels.as_chunks().0[block * groups(self.features) + group]
    }
}

/// A gradient `[tokens, features]` quantized to int8, as [`weight_gradient`] reads it.
#[derive(Clone, Default)]
pub struct GradientPanels {
    tokens: usize,
    features: usize,
    /// [`GROUP_LINES`] for each block and each group; zeros for tokens and features that are not there.
    lines: Vec<Line>,
    /// What a code is multiplied by: for each block [`GROUP_OUTS`] times the number of groups.
    scales: Vec<f32>,
    /// Sums of a block's codes, as many: the kernels multiply with `x + 128` and take 128 of these off again.
    sums: Vec<i32>,
}

impl GradientPanels {
    /// Quantizes `g'[t][o] = gradient[t][o] * token_scales[t]`, row-major `[tokens, features]`, with one scale for each feature and
    /// each [`TOKEN_BLOCK`] tokens: `scale = max_t|g'| / 127`, `code = round(g' * (127 / max_t|g'|))`, ties to even.
    ///
    /// NaN or infinity make the scale NaN or infinite, and so every product with it. Where no magnitude reaches 1e-36, codes are 0.
    ///
    /// # Panics
    /// If the length of `gradient` is not that of `token_scales` times `features`.
    pub fn quantize(gradient: &[f32], features: usize, token_scales: &[f32]) -> Self {
        let mut panels = Self::default();
        panels.fill(gradient, features, token_scales);
        panels
    }

    /// [`GradientPanels::quantize`] into buffers that are already there.
    ///
    /// # Panics
    /// As [`GradientPanels::quantize`].
    pub fn fill(&mut self, gradient: &[f32], features: usize, token_scales: &[f32]) {
        let tokens = token_scales.len();
        assert_eq!(
            tokens.checked_mul(features),
            Some(gradient.len()),
            "a gradient of {tokens} rows of {features}"
        );
        (self.tokens, self.features) = (tokens, features);
        let groups = groups(features);
        let chunks = tokens.div_ceil(TOKEN_BLOCK) * groups;
        resize(&mut self.lines, chunks * GROUP_LINES);
        self.scales.resize(chunks * GROUP_OUTS, 0.0);
        self.sums.resize(chunks * GROUP_OUTS, 0);
        let (scales, sums) = (Pointer(self.scales.as_mut_ptr()), Pointer(self.sums.as_mut_ptr()));
        pool::for_chunks(&mut self.lines, GROUP_LINES, |chunk, lines| {
            // SAFETY: chunk < chunks, for each of which `scales` and `sums` hold GROUP_OUTS values (made so above); each chunk
            // belongs to one task.
            let (scales, sums) = unsafe {
                (
                    &mut *scales.get().cast::<[f32; GROUP_OUTS]>().add(chunk),
                    &mut *sums.get().cast::<[i32; GROUP_OUTS]>().add(chunk),
                )
            };
            let (first_token, first) = (chunk / groups * TOKEN_BLOCK, chunk % groups * GROUP_OUTS);
            let token_scales = &token_scales[first_token..tokens.min(first_token + TOKEN_BLOCK)];
            let gradient = &gradient[first_token * features..][..token_scales.len() * features];
            if features - first >= GROUP_OUTS {
                quantize_block(&gradient[first..], features, token_scales, lines, scales, sums);
            } else {
                let mut padded = vec![0f32; token_scales.len() * GROUP_OUTS];
                for (out, row) in padded.chunks_exact_mut(GROUP_OUTS).zip(gradient.chunks_exact(features)) {
                    out[..features - first].copy_from_slice(&row[first..]);
                }
                quantize_block(&padded, GROUP_OUTS, token_scales, lines, scales, sums);
            }
        });
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Length of a token's gradient.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Code and scale of a token's feature.
    #[cfg(test)]
    pub(super) fn code(&self, token: usize, feature: usize) -> (i8, f32) {
        let (block, token) = (token / TOKEN_BLOCK, token % TOKEN_BLOCK);
        let chunk = block * groups(self.features) * GROUP_OUTS;
        let line = self.lines[(chunk + feature) / PANEL * STEPS + token / STEP];
        (line.0[feature % PANEL * STEP + token % STEP] as i8, self.scales[chunk + feature])
    }
}

/// Groups of panels that a number of features take.
fn groups(features: usize) -> usize {
    features.div_ceil(GROUP_OUTS)
}

/// Makes room for lines; what is in them is of no interest.
fn resize(lines: &mut Vec<Line>, count: usize) {
    if count > lines.capacity() {
        *lines = zeroed(count);
    } else {
        lines.resize(count, Line::ZERO);
    }
}

simd_fn! {
    /// The panels of a group: row `t` of the block is the line `rows[t * stride]`. Of the last step, whatever rows are there.
    ///
    /// # Panics
    /// If `rows` does not hold whole steps of rows, or `lines` not a group.
    fn interleave_rows(rows: &[Line], stride: usize, tokens: usize, lines: &mut [Line]) {
        for step in 0..tokens.div_ceil(STEP) {
            let rows = [0, 1, 2, 3].map(|c| &rows[(step * STEP + c) * stride].0);
            for (panel, line) in interleave(rows).into_iter().enumerate() {
                // The highest bit flipped is 128 added.
                lines[panel * STEPS + step] = Line(line.0.map(|byte| byte ^ ZERO));
            }
        }
    }
}

/// Largest magnitudes below this are taken for 0: their inverse would not be finite.
const TINY: f32 = 1e-36;

simd_fn! {
    /// Codes, scales and sums of a group of features in a block: row `t` begins at `gradient[t * stride]`.
    ///
    /// # Panics
    /// If a row of `gradient` has fewer than [`GROUP_OUTS`] values, or `lines` are not a group.
    fn quantize_block(
        gradient: &[f32],
        stride: usize,
        token_scales: &[f32],
        lines: &mut [Line],
        scales: &mut [f32; GROUP_OUTS],
        sums: &mut [i32; GROUP_OUTS],
    ) {
        let (panels, _) = lines.as_chunks_mut::<STEPS>();
        let mut inverse = [0f32; GROUP_OUTS];
        // The bits of |x| order as |x| does, with NaN above infinity.
        let mut max = [0u32; GROUP_OUTS];
        for (token, scale) in token_scales.iter().enumerate() {
            let row = row(gradient, token * stride);
            for f in 0..GROUP_OUTS {
                max[f] = max[f].max((row[f] * scale).to_bits() & 0x7fff_ffff);
            }
        }
        for f in 0..GROUP_OUTS {
            let max = f32::from_bits(max[f]);
            scales[f] = max / ACT_MAX;
            inverse[f] = if max >= TINY { ACT_MAX / max } else { 0.0 };
        }
        *sums = [0; GROUP_OUTS];
        for step in 0..STEPS {
            // One token after the other over all features: so it is the features that become lanes of vectors.
            let mut lanes = [0u32; GROUP_OUTS];
            for c in 0..STEP.min(token_scales.len().saturating_sub(step * STEP)) {
                let token = step * STEP + c;
                let (row, scale) = (row(gradient, token * stride), token_scales[token]);
                for f in 0..GROUP_OUTS {
                    // Of a magnitude up to 127; anything for NaN, whose scale is NaN.
                    let bits = (row[f] * scale * inverse[f] + ROUND).to_bits();
                    lanes[f] |= (bits & 0xff) << (8 * c);
                    sums[f] += i32::from(bits as u8 as i8);
                }
            }
            for (panel, lanes) in panels.iter_mut().zip(lanes.as_chunks::<PANEL>().0) {
                for (bytes, lane) in panel[step].0.as_chunks_mut::<STEP>().0.iter_mut().zip(lanes) {
                    *bytes = lane.to_le_bytes();
                }
            }
        }
    }
}

/// The values of a group from `first` on.
#[inline(always)]
fn row(gradient: &[f32], first: usize) -> &[f32; GROUP_OUTS] {
    gradient[first..].first_chunk().expect("a row as wide as a group")
}

/// Outputs of a row of a tile, those of one group.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Outputs(pub(super) [f32; GROUP_OUTS]);

/// What a block adds to one group of a tile. Made by [`weight_gradient`].
pub(super) struct Outer<'a> {
    /// Panels of the gradient's codes, of which those of the rows count.
    pub(super) gradient: &'a [[Line; STEPS]],
    /// For each row, what its sums are multiplied by.
    pub(super) scales: &'a [f32],
    /// For each row, the sum of its codes.
    pub(super) sums: &'a [i32],
    /// Panels of codes `x + 128`.
    pub(super) activations: &'a [[Line; STEPS]; GROUP],
}

impl Outer<'_> {
    /// Number of rows: features of the gradient, at most [`TILE_ROWS`].
    pub(super) fn rows(&self) -> usize {
        self.scales.len()
    }

    /// What the sum of a row has too much, with a minus: it is what to start from.
    pub(super) fn start(&self, row: usize) -> i32 {
        -i32::from(ZERO) * self.sums[row]
    }

    /// The panel of a row's codes, and which four bytes of each of its lines they are.
    pub(super) fn row(&self, row: usize) -> (&[Line; STEPS], usize) {
        (&self.gradient[row / PANEL], row % PANEL)
    }
}

thread_local! {
    /// The tile at work.
    static TILE: RefCell<Vec<Outputs>> = const { RefCell::new(Vec::new()) };
}

/// `out[o, i] = keep * out[o, i] + Σ_b (Σ_t code_g[t, o] * code_x[t, i]) * scale_g[b, o]`, `t` going over the tokens of block `b`.
///
/// `code_g * scale_g` being the gradient times the activations' scales, this is the gradient of the weight. With a `keep` of 0,
/// `out` is not read.
///
/// # Shapes
/// `[tokens, out_features] x [tokens, in_features] -> [out_features, in_features]`
///
/// # Errors
/// The shapes do not fit; then nothing is computed.
pub fn weight_gradient(
    kernel: Kernel,
    gradient: &GradientPanels,
    activations: &ActivationPanels,
    keep: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let (out_features, in_features) = (gradient.features, activations.features);
    if gradient.tokens != activations.tokens || out_features.checked_mul(in_features) != Some(out.len()) {
        return Err(KernelError::Gradient {
            gradient_tokens: gradient.tokens,
            tokens: activations.tokens,
            out_features,
            in_features,
            output: out.len(),
        });
    }
    let row_tiles = out_features.div_ceil(TILE_ROWS);
    let groups = groups(in_features);
    let at_once = (row_tiles * groups / (pool::threads() * TASKS)).clamp(1, TILE_GROUPS);
    let out = Pointer(out.as_mut_ptr());
    with_isa!(kernel, isa => pool::run(row_tiles * groups.div_ceil(at_once), &|task| {
        let first_row = task % row_tiles * TILE_ROWS;
        let first_group = task / row_tiles * at_once;
        let tile = Tile {
            first_row,
            rows: TILE_ROWS.min(out_features - first_row),
            first_group,
            groups: at_once.min(groups - first_group),
        };
        // SAFETY: `out` holds `out_features * in_features` values (checked above), and each tile belongs to one task.
        unsafe { tile.compute(isa, gradient, activations, keep, &out) };
    }));
    Ok(())
}

/// Some rows of the weight, and some groups of its columns.
struct Tile {
    first_row: usize,
    rows: usize,
    first_group: usize,
    groups: usize,
}

impl Tile {
    /// # Safety
    /// `out` is where a weight of the operands' features begins, and nothing else uses this tile of it meanwhile.
    unsafe fn compute(
        &self,
        isa: impl Isa,
        gradient: &GradientPanels,
        activations: &ActivationPanels,
        keep: f32,
        out: &Pointer<f32>,
    ) {
        let columns = activations.features;
        let place = |group: usize, row: usize| {
            let first = (self.first_group + group) * GROUP_OUTS;
            let count = GROUP_OUTS.min(columns - first);
            // SAFETY: the row is one of the weight's, and first + count <= columns; the rest is the caller's promise.
            unsafe {
                let start = out.get().add((self.first_row + row) * columns + first);
                std::slice::from_raw_parts_mut(start, count)
            }
        };
        TILE.with_borrow_mut(|tile| {
            tile.clear();
            tile.resize(self.groups * self.rows, Outputs([0.0; GROUP_OUTS]));
            if keep != 0.0 {
                for (at, outputs) in tile.iter_mut().enumerate() {
                    let old = place(at / self.rows, at % self.rows);
                    outputs.0.iter_mut().zip(old).for_each(|(y, old)| *y = keep * *old);
                }
            }
            let of_block = groups(gradient.features) * GROUP_OUTS;
            for block in 0..gradient.tokens.div_ceil(TOKEN_BLOCK) {
                let first = block * of_block + self.first_row;
                for (group, tile) in tile.chunks_exact_mut(self.rows).enumerate() {
                    let outer = Outer {
                        gradient: &gradient.lines.as_chunks().0[first / PANEL..],
                        scales: &gradient.scales[first..][..self.rows],
                        sums: &gradient.sums[first..][..self.rows],
                        activations: activations.group(block, self.first_group + group),
                    };
                    isa.outer(&outer, tile);
                }
            }
            for (at, outputs) in tile.iter().enumerate() {
                let out = place(at / self.rows, at % self.rows);
                out.copy_from_slice(&outputs.0[..out.len()]);
            }
        });
    }
}

impl std::fmt::Debug for ActivationPanels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ActivationPanels {{ {} x {} }}", self.tokens, self.features)
    }
}

impl std::fmt::Debug for GradientPanels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GradientPanels {{ {} x {} }}", self.tokens, self.features)
    }
}

#[cfg(test)]
mod tests;
