//! Jobs carried out on a few threads, those that need the same thing one after the other.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Turns<N, R> {
    /// Jobs nobody has taken, in their order.
    waiting: Vec<usize>,
    taken: BTreeSet<N>,
    results: Vec<Option<R>>,
}

/// Does all jobs, at most `threads` at a time, and returns what came of them in their order. A job begins when nobody has what it
/// needs; of those that may begin, the first. One that panics ends all.
pub(crate) fn run<J: Sync, R: Send, N: Ord + Clone + Send, S: IntoIterator<Item = N>>(
    jobs: &[J],
    threads: usize,
    needs: impl Fn(&J) -> S + Sync,
    work: impl Fn(&J) -> R + Sync,
) -> Vec<R> {
    let results = std::iter::repeat_with(|| None).take(jobs.len()).collect();
    let turns =
        Mutex::new(Turns { waiting: (0..jobs.len()).collect(), taken: BTreeSet::new(), results });
    let given_back = Condvar::new();
    let needs = |at: usize| -> BTreeSet<N> {
        jobs.get(at).map_or_else(BTreeSet::new, |job| needs(job).into_iter().collect())
    };
    let worker = || {
        let mut turn = lock(&turns);
        while !turn.waiting.is_empty() {
            let free = |at: &usize| needs(*at).is_disjoint(&turn.taken);
            let Some(next) = turn.waiting.iter().position(free) else {
                turn = given_back.wait(turn).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let at = turn.waiting.remove(next);
            let mine = needs(at);
            turn.taken.extend(mine.iter().cloned());
            drop(turn);
            let back = GiveBack { turns: &turns, given_back: &given_back, needs: mine };
            let result = jobs.get(at).map(&work);
            if let Some(slot) = lock(&turns).results.get_mut(at) {
                *slot = result;
            }
            drop(back);
            turn = lock(&turns);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, jobs.len().max(1)) {
            scope.spawn(worker);
        }
    });
    let turns = turns.into_inner().unwrap_or_else(PoisonError::into_inner);
    turns.results.into_iter().flatten().collect()
}

/// Gives back what a job needed. After a panic nobody begins another.
struct GiveBack<'a, N: Ord, R> {
    turns: &'a Mutex<Turns<N, R>>,
    given_back: &'a Condvar,
    needs: BTreeSet<N>,
}

impl<N: Ord, R> Drop for GiveBack<'_, N, R> {
    fn drop(&mut self) {
        let mut turn = lock(self.turns);
        turn.taken.retain(|need| !self.needs.contains(need));
        if std::thread::panicking() {
            turn.waiting.clear();
        }
        self.given_back.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn every_job_is_done_once_and_results_are_in_their_order() {
        let jobs: Vec<u32> = (0..100).collect();
        let done = AtomicU32::new(0);
        let results = run(
            &jobs,
            7,
            |_| [(); 0],
            |job| {
                done.fetch_add(1, Ordering::SeqCst);
                job * 2
            },
        );
        assert_eq!(results, (0..100).map(|job| job * 2).collect::<Vec<_>>());
        assert_eq!(done.into_inner(), 100);
        assert!(run(&[0; 0], 7, |_| [(); 0], |job| *job).is_empty());
    }

    #[test]
    fn jobs_that_need_the_same_wait_for_each_other_and_others_do_not() {
        let users = [AtomicU32::new(0), AtomicU32::new(0)];
        let both = Barrier::new(2);
        // The first of each kind meet: they are done at once.
        let jobs = [(0, true), (0, false), (1, true), (1, false), (0, false)];
        run(
            &jobs,
            4,
            |job| [job.0],
            |(which, meets)| {
                let user: &AtomicU32 = &users[*which];
                assert_eq!(user.fetch_add(1, Ordering::SeqCst), 0, "nobody else has it");
                if *meets {
                    both.wait();
                }
                user.fetch_sub(1, Ordering::SeqCst);
            },
        );
    }

    #[test]
    fn a_job_that_panics_ends_all_instead_of_being_waited_for() {
        let result = std::panic::catch_unwind(|| {
            run(&[0, 1, 2, 3], 2, |_| [0], |job| assert!(*job != 1, "as it should"));
        });
        assert!(result.is_err());
    }
}
