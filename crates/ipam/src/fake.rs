//! A directory in memory whose process can be killed before or in the middle of any step.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;

use crate::disk::Disk;

#[derive(Debug, Default)]
struct State {
    /// Name to inode.
    names: BTreeMap<String, u64>,
    content: BTreeMap<u64, Vec<u8>>,
    claims: BTreeSet<u64>,
    next_inode: u64,
    locked: bool,
    /// Steps until the process dies; `None`: it lives.
    steps_left: Option<usize>,
    /// This one step fails, and the process lives on.
    failing: Option<usize>,
    steps: usize,
}

/// Clones share the directory.
#[derive(Debug, Clone, Default)]
pub struct FakeDisk(Rc<RefCell<State>>);

#[derive(Debug)]
pub struct FakeLock(Rc<RefCell<State>>);

impl Drop for FakeLock {
    fn drop(&mut self) {
        self.0.borrow_mut().locked = false;
    }
}

#[derive(Debug)]
pub struct FakeFile {
    state: Rc<RefCell<State>>,
    inode: u64,
    claimed: RefCell<bool>,
}

impl Drop for FakeFile {
    fn drop(&mut self) {
        if *self.claimed.borrow() {
            self.state.borrow_mut().claims.remove(&self.inode);
        }
    }
}

impl FakeDisk {
    /// The process dies at this step; all steps fail from there on.
    pub fn kill_at(&self, step: usize) {
        self.0.borrow_mut().steps_left = Some(step);
    }

    /// This step from now fails as on a full disk, those behind it work.
    pub fn fail_at(&self, step: usize) {
        let mut state = self.0.borrow_mut();
        state.failing = Some(state.steps + step);
    }

    /// A new process.
    pub fn revive(&self) {
        self.0.borrow_mut().steps_left = None;
    }

    pub fn was_killed(&self) -> bool {
        self.0.borrow().steps_left == Some(0)
    }

    pub fn steps(&self) -> usize {
        self.0.borrow().steps
    }

    /// Nothing is synced: every file may be torn.
    pub fn lose_power(&self) {
        for bytes in self.0.borrow_mut().content.values_mut() {
            bytes.truncate(bytes.len() / 2);
        }
    }

    pub fn names(&self) -> Vec<String> {
        self.0.borrow().names.keys().cloned().collect()
    }

    fn step(&self) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        state.steps += 1;
        if state.failing == Some(state.steps) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        match &mut state.steps_left {
            Some(0) => Err(io::Error::other("killed")),
            Some(left) => {
                *left -= 1;
                if *left == 0 { Err(io::Error::other("killed")) } else { Ok(()) }
            }
            None => Ok(()),
        }
    }
}

impl Disk for FakeDisk {
    type Lock = FakeLock;
    type File = FakeFile;

    fn lock(&self) -> io::Result<FakeLock> {
        self.step()?;
        let mut state = self.0.borrow_mut();
        assert!(!state.locked, "the directory lock is not recursive");
        state.locked = true;
        Ok(FakeLock(Rc::clone(&self.0)))
    }

    fn try_lock(&self) -> io::Result<Option<FakeLock>> {
        self.step()?;
        let mut state = self.0.borrow_mut();
        let free = !std::mem::replace(&mut state.locked, true);
        Ok(free.then(|| FakeLock(Rc::clone(&self.0))))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.step()?;
        Ok(self.names())
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.step()?;
        let state = self.0.borrow();
        Ok(state.names.get(name).and_then(|inode| state.content.get(inode)).cloned())
    }

    fn write_new(&self, name: &str, bytes: &[u8]) -> io::Result<FakeFile> {
        let died = self.step();
        let mut state = self.0.borrow_mut();
        if died.is_err() {
            // Killed in the middle, or the disk is full: the name is there, half the content too.
            let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
            state.next_inode += 1;
            let inode = state.next_inode;
            if state.locked {
                state.names.entry(name.to_owned()).or_insert(inode);
                state.content.insert(inode, half.to_vec());
            }
        }
        died?;
        assert!(state.locked, "{name} is written without the lock");
        if state.names.contains_key(name) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        state.next_inode += 1;
        let inode = state.next_inode;
        state.names.insert(name.to_owned(), inode);
        state.content.insert(inode, bytes.to_vec());
        Ok(FakeFile { state: Rc::clone(&self.0), inode, claimed: RefCell::new(false) })
    }

    fn overwrite(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let died = self.step();
        let mut state = self.0.borrow_mut();
        assert!(state.locked || died.is_err(), "{name} is written without the lock");
        state.next_inode += 1;
        let new = state.next_inode;
        let inode = *state.names.entry(name.to_owned()).or_insert(new);
        // Killed in the middle: half of it is new.
        let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
        state.content.insert(inode, if died.is_err() { half.to_vec() } else { bytes.to_vec() });
        died
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step()?;
        let mut state = self.0.borrow_mut();
        assert!(state.locked, "{to} is named without the lock");
        let inode = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), inode);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.step()?;
        let mut state = self.0.borrow_mut();
        assert!(state.locked, "{name} is removed without the lock");
        state.names.remove(name);
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<Option<FakeFile>> {
        self.step()?;
        let inode = self.0.borrow().names.get(name).copied();
        let claimed = RefCell::new(false);
        Ok(inode.map(|inode| FakeFile { state: Rc::clone(&self.0), inode, claimed }))
    }

    fn try_claim(&self, file: &FakeFile) -> io::Result<bool> {
        self.step()?;
        let free = self.0.borrow_mut().claims.insert(file.inode);
        *file.claimed.borrow_mut() |= free;
        Ok(free)
    }

    fn claim(&self, file: &FakeFile) -> io::Result<()> {
        assert!(self.try_claim(file)?, "one thread cannot wait for itself");
        Ok(())
    }
}
