//! A pool of threads with cheap barriers, for work that comes in pieces of microseconds.
//!
//! A token passes a hundred products, each over before a sleeping thread would have woken up. So the threads here spin
//! for a while before they sleep, a piece of work starts with one store, and it ends when the threads that took part have
//! left it: one that sleeps or was sent away by the system is not waited for.
//!
//! Each thread starts with a run of tasks of its own, so that what they read is one stream; who is done first takes over
//! tasks of the others. Which thread does which task is left to chance; results must not depend on it.

use std::cell::RefCell;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle thread spins before it sleeps: longer than what lies between two products of a token.
const SPIN: Duration = Duration::from_micros(200);

/// Set in [`Shared::state`] while no more threads may join the work.
const CLOSED: u64 = 1 << 31;
/// The bits of [`Shared::state`] that count the threads at work; above [`CLOSED`] the number of the work.
const JOINED: u64 = CLOSED - 1;

/// The work at hand: `work(i)` for every task `i < tasks`.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// A counter in a cache line of its own, so that threads do not wait for each other's.
#[repr(align(64))]
struct Counter(AtomicUsize);

struct Shared {
    /// Number of the work, whether it is closed, and how many threads are at it.
    state: AtomicU64,
    /// Written by the thread that holds `Pool::leader` while `state` is closed and nobody has joined.
    job: std::cell::UnsafeCell<Job>,
    /// For each thread, the next task of its own run that nobody has taken; the run ends where the next thread's begins.
    next: Vec<Counter>,
    panicked: AtomicBool,
    quit: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `job` is the only field that is not `Sync`. It is written only while `state` is closed with nobody joined, and
// read only by threads that have joined an open one; both go through `state` (release, then acquire).
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is used only while the call of `Pool::run` that made it waits.
unsafe impl Send for Shared {}

/// A number of threads that share tasks. The thread that brings the work is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    leader: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
}

static GLOBAL: OnceLock<Arc<Pool>> = OnceLock::new();

impl Pool {
    /// A pool of `threads` threads, the caller's included; 0 counts as 1.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: std::cell::UnsafeCell::new(Job { work: &|_: usize| {}, tasks: 0 }),
            next: (0..threads.max(1)).map(|_| Counter(AtomicUsize::new(0))).collect(),
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        });
        let mut pool = Self { shared, leader: Mutex::new(()), workers: Vec::new() };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("bitlinear-{index}"));
            pool.workers.push(builder.spawn(move || shared.serve(index))?);
        }
        Ok(pool)
    }

    /// Makes the pool that [`run`] uses where no other is installed; tells whether it was the first to be asked for.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn set_global(threads: usize) -> std::io::Result<bool> {
        Ok(GLOBAL.set(Arc::new(Self::new(threads)?)).is_ok())
    }

    /// Runs `work` with this pool in place of the global one, on this thread.
    pub fn install<R>(self: &Arc<Self>, work: impl FnOnce() -> R) -> R {
        let before = CURRENT.replace(Some(self.clone()));
        let result = catch_unwind(AssertUnwindSafe(work));
        CURRENT.set(before);
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(i)` once for every `i < tasks`, on any of the threads, and returns when all are done.
    ///
    /// Work that comes from a task of this pool, or while another thread's work is under way, is done by the calling thread
    /// alone.
    ///
    /// # Panics
    /// If a task does.
    pub fn run(&self, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
        let lead = match self.leader.try_lock() {
            Ok(guard) => Some(guard),
            // A task of earlier work panicked: that left nothing behind.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if tasks <= 1 || self.workers.is_empty() || lead.is_none() {
            (0..tasks).for_each(work);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by threads that have joined this work, and `Closing`
        // waits for them to leave before this call ends, in a panic too.
        let work: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work) };
        // SAFETY: this thread holds `leader`, and the last work was closed and left by all before its holder let go.
        unsafe { *shared.job.get() = Job { work, tasks } };
        for (thread, next) in shared.next.iter().enumerate() {
            next.0.store(shared.run_of(thread, tasks).start, Ordering::Relaxed);
        }
        shared.panicked.store(false, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> 32) + 1;
        shared.state.store(number << 32, Ordering::SeqCst);
        let closing = Closing(shared);
        if *lock(&shared.sleepers) > 0 {
            shared.wake.notify_all();
        }
        // SAFETY: `work` is the reference that this function was given.
        shared.work_off(0, tasks, unsafe { &*work });
        drop(closing);
        // Looked at while this thread still leads: the flag is of this work.
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop(lead);
        if panicked {
            panic!("a task panicked on another thread; its message is above");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleepers));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks; there is nothing else to report.
            let _ = worker.join();
        }
    }
}

/// Closes the work and waits for those at it.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // Nobody is to start what is left after a panic.
        self.0.next.iter().for_each(|next| next.0.store(usize::MAX / 2, Ordering::Relaxed));
        self.0.state.fetch_or(CLOSED, Ordering::SeqCst);
        let mut spins = 0u32;
        while self.0.state.load(Ordering::Acquire) & JOINED != 0 {
            spins += 1;
            if spins.is_multiple_of(1 << 12) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Shared {
    /// The tasks that a thread starts with.
    fn run_of(&self, thread: usize, tasks: usize) -> std::ops::Range<usize> {
        let start = |thread: usize| tasks / self.next.len() * thread + (tasks % self.next.len()).min(thread);
        start(thread)..start(thread + 1)
    }

    /// Takes tasks until none is left: its own, then those of the others.
    fn work_off(&self, thread: usize, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
        let threads = self.next.len();
        for thread in (thread..threads).chain(0..thread) {
            let end = self.run_of(thread, tasks).end;
            loop {
                let task = self.next[thread].0.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                work(task);
            }
        }
    }

    /// The life of a worker.
    fn serve(&self, thread: usize) {
        // Not the number that stands there by now: a thread that starts late joins the work under way.
        let mut done = 0;
        while let Some(state) = self.wait(done) {
            done = state >> 32;
            if state & CLOSED != 0
                || self
                    .state
                    .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
                    .is_err_and(|now| !self.join_changed(now, done))
            {
                continue;
            }
            // SAFETY: this thread has joined open work, so its leader waits, and the job and what it points to stay.
            let job = unsafe { *self.job.get() };
            // SAFETY: as above.
            let work = unsafe { &*job.work };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work_off(thread, job.tasks, work))) {
                self.panicked.store(true, Ordering::Relaxed);
                // The leader says that there was a panic; to drop what was thrown could throw again.
                std::mem::forget(panic);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Joins work `number` although others joined meanwhile; false if it was closed first.
    fn join_changed(&self, mut now: u64, number: u64) -> bool {
        while now >> 32 == number && now & CLOSED == 0 {
            match self.state.compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(changed) => now = changed,
            }
        }
        false
    }

    /// The state once there is other work than `done`; `None` at the end.
    fn wait(&self, done: u64) -> Option<u64> {
        let news = || {
            let state = self.state.load(Ordering::SeqCst);
            (state >> 32 != done).then_some(state)
        };
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if let Some(state) = news() {
                    return Some(state);
                }
                std::hint::spin_loop();
            }
            if self.quit.load(Ordering::SeqCst) {
                return None;
            }
            if start.elapsed() > SPIN {
                break;
            }
        }
        let mut sleepers = lock(&self.sleepers);
        *sleepers += 1;
        let state = loop {
            if self.quit.load(Ordering::SeqCst) {
                break None;
            }
            // Looked at under the lock: who brings work after this finds a sleeper.
            if let Some(state) = news() {
                break Some(state);
            }
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        };
        *sleepers -= 1;
        state
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pool that this thread uses: the one installed, else the global one, else a new one with a thread for each core.
fn current() -> Arc<Pool> {
    if let Some(pool) = CURRENT.with_borrow(Clone::clone) {
        return pool;
    }
    let global = GLOBAL.get_or_init(|| {
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        // Without threads of its own a pool works on the caller's.
        Arc::new(Pool::new(threads).or_else(|_| Pool::new(1)).expect("a pool of one thread starts none"))
    });
    global.clone()
}

/// Number of threads of the pool that [`run`] uses.
pub fn threads() -> usize {
    current().threads()
}

/// [`Pool::run`] on the installed pool, or the global one.
///
/// # Panics
/// If a task does.
pub fn run(tasks: usize, work: &(dyn Fn(usize) + Sync)) {
    if tasks <= 1 {
        (0..tasks).for_each(work);
    } else {
        current().run(tasks, work);
    }
}

/// Calls `work(i, chunk i)` for every chunk of `width` values of `data`, the last one being shorter where it must.
///
/// # Panics
/// If `width` is 0 or a task panics.
pub fn for_chunks<T: Send>(data: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let (len, start) = (data.len(), Pointer(data.as_mut_ptr()));
    run(len.div_ceil(width), &|index| {
        let first = index * width;
        // SAFETY: chunks of different tasks do not overlap, lie inside `data` (first < len, as index < len / width
        // rounded up), and `data` is borrowed exclusively until `run` returns.
        let chunk = unsafe { std::slice::from_raw_parts_mut(start.get().add(first), width.min(len - first)) };
        work(index, chunk);
    });
}

/// Calls `work(i, item i)` once for every item, and returns the results in the order of items.
///
/// # Panics
/// If a task does.
pub fn map<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(usize, T) -> R + Sync,
) -> Vec<R> {
    let places: Vec<_> = items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
    run(places.len(), &|index| {
        let mut place = lock(&places[index]);
        if let Some(item) = place.0.take() {
            place.1 = Some(work(index, item));
        }
    });
    let results =
        places.into_iter().map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner).1);
    results.map(|result| result.expect("`run` has called every task")).collect()
}

/// The start of a slice whose parts are given to tasks.
pub(crate) struct Pointer<T>(pub(crate) *mut T);

impl<T> Pointer<T> {
    /// Through a method, so that closures hold the whole and not the bare pointer.
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: whoever shares a pointer says why its tasks do not meet; the values themselves may go to other threads.
unsafe impl<T: Send> Sync for Pointer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [0, 1, 2, 5] {
            let pool = Arc::new(Pool::new(threads).unwrap());
            assert_eq!(pool.threads(), threads.max(1));
            for round in 0..2000 {
                let tasks = round % 37;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
            }
        }
    }

    #[test]
    fn threads_that_sleep_wake_up() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(4 * SPIN);
            // No task ends before all three threads have one; a thread that never comes is an error after a minute.
            let (arrived, start) = (AtomicUsize::new(0), Instant::now());
            pool.run(3, &|_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 3 {
                    assert!(start.elapsed() < Duration::from_secs(60), "a thread did not wake up");
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_is_told_to_the_leader_whose_work_it_was() {
        let pool = Pool::new(2).unwrap();
        std::thread::scope(|scope| {
            for bad in [true, false] {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..300 {
                        let result = catch_unwind(AssertUnwindSafe(|| {
                            pool.run(8, &|task| assert!(!bad || task != 5))
                        }));
                        assert_eq!(result.is_err(), bad);
                    }
                });
            }
        });
    }

    #[test]
    fn work_from_within_and_from_beside_is_done() {
        let pool = Arc::new(Pool::new(2).unwrap());
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..200 {
                            run(5, &|_| run(3, &|_| _ = count.fetch_add(1, Ordering::Relaxed)));
                        }
                    });
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 15);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_whole() {
        let pool = Pool::new(3).unwrap();
        for bad in [0, 7, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(100, &|task| assert!(task != bad))));
            assert!(result.is_err());
            let count = AtomicUsize::new(0);
            pool.run(100, &|_| _ = count.fetch_add(1, Ordering::Relaxed));
            assert_eq!(count.into_inner(), 100);
        }
    }

    #[test]
    fn map_gives_every_item_once_and_keeps_the_order() {
        let mut data = vec![0; 1003];
        let pool = Arc::new(Pool::new(3).unwrap());
        let sums = pool.install(|| {
            map(data.chunks_mut(10), |index, chunk| {
                chunk.fill(index);
                chunk.iter().sum::<usize>()
            })
        });
        assert!(sums.iter().enumerate().all(|(i, sum)| *sum == i * if i == 100 { 3 } else { 10 }));
        assert!(data.iter().enumerate().all(|(at, x)| *x == at / 10));
    }

    #[test]
    fn chunks_cover_the_data() {
        let mut data = vec![0; 1003];
        for_chunks(&mut data, 10, |index, chunk| chunk.iter_mut().for_each(|x| *x += index + 1));
        assert!(data.iter().enumerate().all(|(at, x)| *x == at / 10 + 1));
        for_chunks(&mut [] as &mut [u8], 3, |_, _| unreachable!());
    }
}
