//! Memory in lines of 64 bytes, as the caches and the widest vectors have them.

/// 64 bytes that lie in one cache line.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

impl Line {
    /// All bytes zero.
    pub const ZERO: Self = Self([0; 64]);
}

/// `count` lines of zeros, in huge pages where the system gives them: reading a large weight then costs fewer look-ups.
pub fn zeroed(count: usize) -> Vec<Line> {
    let mut lines = Vec::with_capacity(count);
    // Before the first write, which is what makes the system choose the pages.
    ask_for_huge_pages(&mut lines);
    lines.resize(count, Line::ZERO);
    lines
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(lines: &mut Vec<Line>) {
    use rustix::mm::{Advice, madvise};
    const HUGE: usize = 2 << 20;
    let start = lines.as_mut_ptr().cast::<u8>();
    let skipped = start.align_offset(HUGE);
    let whole = (lines.capacity() * size_of::<Line>()).saturating_sub(skipped) / HUGE * HUGE;
    if whole > 0 {
        // SAFETY: the range lies in the vector's own memory (skipped + whole <= its capacity in bytes), and this advice
        // changes which pages are used, not what is in them. Where it is refused, small pages do.
        let _ = unsafe { madvise(start.add(skipped).cast(), whole, Advice::LinuxHugepage) };
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &mut Vec<Line>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_zero() {
        for count in [0, 1, 3, 200_000] {
            let lines = zeroed(count);
            assert_eq!(lines.len(), count);
            assert!(lines.as_ptr().cast::<u8>().align_offset(64) == 0);
            assert!(lines.iter().all(|line| *line == Line::ZERO));
        }
    }
}
