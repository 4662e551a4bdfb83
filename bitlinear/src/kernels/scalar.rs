//! The scalar kernel: the truth that every other kernel equals.

use super::gradient::{Outer, Outputs};
use super::{GROUP, GROUP_OUTS, Isa, Unpacked};
use crate::packed::{Layout, Line, PANEL, STEP, unpack_lines};

/// Plain loops, on any processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scalar;

impl Isa for Scalar {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let mut codes = [Line::ZERO; 5];
        let mut sums = [[0; PANEL]; R];
        for (index, line) in panel.iter().enumerate() {
            unpack_lines(layout, std::slice::from_ref(line), &mut codes);
            for (i, codes) in codes[..layout.vectors()].iter().enumerate() {
                for (x, sums) in x.iter().zip(&mut sums) {
                    add_step(codes, x, index * layout.vectors() + i, sums);
                }
            }
        }
        sums
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let mut sums = [[0; PANEL]; R];
        for (x, sums) in x.iter().zip(&mut sums) {
            for (step, codes) in panel.iter().enumerate() {
                add_step(codes, x, step, sums);
            }
        }
        sums
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        for row in 0..group.rows {
            for panel in 0..GROUP {
                let mut of_panel = [0; PANEL];
                for (step, codes) in group.panel(panel).iter().enumerate() {
                    add_step(codes, group.row(row), step, &mut of_panel);
                }
                sums[row * GROUP_OUTS + panel * PANEL..][..PANEL].copy_from_slice(&of_panel);
            }
        }
    }

    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        for (row, outputs) in tile.iter_mut().enumerate() {
            let (gradient, lane) = block.row(row);
            for (panel, outputs) in block.activations.iter().zip(outputs.0.as_chunks_mut::<PANEL>().0) {
                let mut sums = [block.start(row); PANEL];
                for (step, codes) in panel.iter().enumerate() {
                    add_step(codes, gradient, step * PANEL + lane, &mut sums);
                }
                for (y, sum) in outputs.iter_mut().zip(sums) {
                    *y += sum as f32 * block.scales[row];
                }
            }
        }
    }
}

/// Adds the products of one code vector with its four activations.
fn add_step(codes: &Line, x: &[Line], step: usize, sums: &mut [i32; PANEL]) {
    let x = &x[step / 16].0.as_chunks::<STEP>().0[step % 16];
    for (codes, sum) in codes.0.as_chunks::<STEP>().0.iter().zip(sums) {
        for (code, x) in codes.iter().zip(x) {
            *sum = sum.wrapping_add(i32::from(*code) * i32::from(*x as i8));
        }
    }
}
