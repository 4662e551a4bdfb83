//! One plain Rust function compiled for several vector instruction sets and picked at run time.
//!
//! A closure handed to a dispatcher does not do: the compiler may leave it out of line, compiled for the baseline, where
//! each fused multiply-add becomes a library call. So [`simd_fn!`](crate::simd_fn) repeats the body inside a function
//! that has the instructions enabled; functions marked `#[inline(always)]` that it calls become part of it.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::kernels::KERNEL_VARIABLE;

/// What [`simd_fn!`](crate::simd_fn) chooses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// What every processor of this architecture has.
    Baseline,
    /// x86-64 with AVX2 and fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512 (F, BW, DQ, VL).
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The widest level that this processor has, but at most AVX2 where `BITLINEAR_KERNEL` is `avx2`. Decided once a process.
#[inline]
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && std::env::var_os(KERNEL_VARIABLE).is_none_or(|name| name != "avx2");
            return if avx512 { Level::Avx512 } else { Level::Avx2 };
        }
        Level::Baseline
    })
}

/// Defines a function whose body is compiled for each [`Level`](crate::simd::Level) and dispatched at each call; it may be
/// generic over one type.
///
/// The arithmetic is the same on every level, so the result is too; call it once for a whole row or block, not for a value.
///
/// ```
/// bitlinear::simd_fn! {
///     /// `Σ x_i^2`
///     fn square(x: &[f32]) -> f32 {
///         bitlinear::math::dot(x, x)
///     }
/// }
/// assert_eq!(square(&[1.0, 2.0, 3.0]), 14.0);
/// ```
#[macro_export]
macro_rules! simd_fn {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? $body
            fn baseline $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? $body
            match $crate::simd::level() {
                // SAFETY: `level` found these instructions on this processor.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: `level` found these instructions on this processor.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($argument),*) },
                $crate::simd::Level::Baseline => baseline($($argument),*),
            }
        }
    };
}
