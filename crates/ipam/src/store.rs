//! Reservations: made before a pod's interface, removed after it.
//!
//! ```text
//! reserve    lock ─ sweep (other boot) ─ probe for leftovers ─ choose ─ write, claim, RENAME ─ unlock
//! release    lock ─ UNLINK ─ unlock
//! ```
//!
//! Nothing is synced: a killed process loses nothing that it wrote, and what a power loss tears is of another boot, whose
//! reservations are all free whatever is left of them.
//!
//! The kernel's objects always go before the record: killed in between, the record is still there to lead the next
//! one to them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_types::attachment::{ATTACHMENT_VERSION, Attachment};
use serde::{Deserialize, Serialize};

use crate::choose;
use crate::disk::Disk;
use crate::owner::{OwnerHash, RecordName};

/// Records looked at in each ADD for pods that are gone. Two system calls each: about half a
/// millisecond, and all records of a full node (110 to 250 pods) within eight ADDs.
pub const PROBES_PER_ADD_MAX: usize = 32;

/// A dual-stack record with a container id of 64 digits has 600 bytes.
const RECORD_BYTES_TYPICAL: usize = 1024;

const BOOT_FILE: &str = "boot";
const CURSOR_FILE: &str = "cursor.state";
/// Two addresses and an owner's hash take half of it. The file keeps its size and its place: a file put in place of
/// another, as every ADD would, has the disk written to and the old one's blocks given back before the call returns.
const CURSOR_BYTES: usize = 512;
const TEMP_PREFIX: &str = ".tmp-";

/// What the store must know of, and may do to, the kernel.
pub trait Pods {
    /// Whether nothing of the pod is left: neither its namespace nor the host side of its link.
    fn is_gone(&self, attachment: &Attachment) -> bool;
    /// Removes what the host still has of it; what is gone already is fine.
    fn clean(&self, attachment: &Attachment) -> anyhow::Result<()>;
}

/// What a pod asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    pub hash: &'a OwnerHash,
    /// The record to be; its addresses are filled in.
    pub template: &'a Attachment,
    /// The node's pod CIDRs: one address of each family among them.
    pub pod_cidrs: &'a [IpNet],
    /// Addresses in use of which the records may know nothing: they were lost, or lie in another folder.
    pub taken: &'a BTreeSet<IpAddr>,
}

/// Addresses that are ours until released. Dropping it gives up the claim, not the addresses.
#[derive(Debug)]
pub struct Reservation<F> {
    pub attachment: Attachment,
    /// Leftovers freed on the way, and other things an operator may want to read.
    pub notes: Vec<String>,
    _claim: F,
}

/// How full a prefix is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    pub prefix: IpNet,
    pub used: usize,
    pub capacity: u128,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("address store: {step}: {source}")]
    Io { step: &'static str, source: io::Error },
    #[error(
        "no free {family} address: {}; delete pods, or give the node a larger pod CIDR",
        describe(.fills)
    )]
    Exhausted { family: &'static str, fills: Vec<Fill> },
    #[error("another ADD of the same container and interface is under way")]
    Busy,
    #[error("host interface {0} belongs to another pod (a clash of hashes): start the pod again")]
    LinkClash(String),
}

/// A record found on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub name: RecordName,
    /// What stands inside; the reason where it cannot be read.
    pub content: Result<Attachment, String>,
}

/// The store of one node.
#[derive(Debug)]
pub struct Store<D> {
    disk: D,
    boot_id: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Cursor {
    last: Vec<IpAddr>,
    probed: String,
}

impl<D: Disk> Store<D> {
    pub fn new(disk: D, boot_id: String) -> Self {
        Self { disk, boot_id }
    }

    /// Reserves one address of each family, frees a few leftovers on the way. The same owner gets the same addresses
    /// again: an earlier ADD of it was killed.
    pub fn reserve(
        &self,
        wish: Wish<'_>,
        pods: &impl Pods,
    ) -> Result<Reservation<D::File>, StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        let mut notes = Vec::new();
        let mut records = self.tidy(&mut notes)?;
        let mut cursor = self.read_cursor();
        if let Some(clash) = records
            .iter()
            .find(|record| record.owner != *wish.hash && record.owner.same_link(wish.hash))
        {
            return Err(StoreError::LinkClash(clash.owner.host_ifname()));
        }
        let kept = self.own_addresses(wish, &mut records)?;
        self.probe(&mut records, &mut cursor, PROBES_PER_ADD_MAX, pods, &mut notes)?;
        let reused = kept.is_some();
        let addresses = match kept {
            Some(addresses) => addresses,
            None => match choose_all(wish, &records, &cursor.last) {
                Ok(addresses) => addresses,
                Err(_) => {
                    let all = records.len();
                    self.probe(&mut records, &mut cursor, all, pods, &mut notes)?;
                    choose_all(wish, &records, &cursor.last)?
                }
            },
        };
        let attachment = Attachment { addresses: addresses.clone(), ..wish.template.clone() };
        let name = RecordName { owner: wish.hash.clone(), addresses: addresses.clone() };
        let claim = self.write_record(&name, &attachment).inspect_err(|_| {
            // A record of an earlier, killed ADD stays: its interface may stand.
            self.take_back(&name, !reused);
        })?;
        cursor.last = addresses;
        if let Err(error) = self.write_cursor(&cursor) {
            // The pod has its addresses; the next one begins to look where this one did.
            notes.push(error.to_string());
        }
        Ok(Reservation { attachment, notes, _claim: claim })
    }

    /// Frees the addresses of those of `suspects` whose pod is gone, and whatever another boot left. For a daemon that looks
    /// at all pods anyway, and never waits: `None` when somebody else is at work here.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub fn free_gone(
        &self,
        suspects: &[OwnerHash],
        pods: &impl Pods,
    ) -> Result<Option<Vec<String>>, StoreError> {
        let Some(_lock) = self.disk.try_lock().map_err(io_at("lock"))? else { return Ok(None) };
        let mut notes = Vec::new();
        let records = self.tidy(&mut notes)?;
        for name in records.iter().filter(|name| suspects.contains(&name.owner)) {
            self.free_if_gone(name, pods, &mut notes)?;
        }
        Ok(Some(notes))
    }

    /// Frees every address whose pod is gone. Returns what was done, in words.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub fn free_all_gone(&self, pods: &impl Pods) -> Result<Vec<String>, StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        let mut notes = Vec::new();
        for name in self.tidy(&mut notes)? {
            self.free_if_gone(&name, pods, &mut notes)?;
        }
        Ok(notes)
    }

    /// Whether a record could be written now: writes as much and takes it away again.
    ///
    /// # Errors
    /// The disk is full, read-only or gone.
    pub fn try_writing(&self) -> Result<(), StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        self.remove_temporary()?;
        let name = format!("{TEMP_PREFIX}trial");
        let written = self.disk.write_new(&name, &[b' '; RECORD_BYTES_TYPICAL]);
        let removed = self.disk.remove(&name);
        written.and(removed).map_err(io_at("write"))
    }

    /// Frees the owner's addresses. Free already is fine.
    pub fn release(&self, hash: &OwnerHash) -> Result<(), StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        self.remove_temporary()?;
        for name in self.names()?.into_iter().filter(|name| name.owner == *hash) {
            self.disk.remove(&name.format()).map_err(io_at("remove a record"))?;
        }
        Ok(())
    }

    /// The owner's records. More than one only after somebody put files there by hand.
    pub fn find(&self, hash: &OwnerHash) -> Result<Vec<Record>, StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        let names = self.names()?.into_iter().filter(|name| name.owner == *hash);
        names.map(|name| self.read_record(name)).collect()
    }

    /// All records.
    pub fn records(&self) -> Result<Vec<Record>, StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        self.names()?.into_iter().map(|name| self.read_record(name)).collect()
    }

    /// Waits for an ADD of this owner that is still under way: it ends by itself, and is never stopped half-way.
    /// Does not hold the directory lock, which that ADD may need to undo its work.
    pub fn wait_for_add(&self, hash: &OwnerHash) -> Result<Vec<D::File>, StoreError> {
        let names = {
            let _lock = self.disk.lock().map_err(io_at("lock"))?;
            self.names()?
        };
        let mut claims = Vec::new();
        for name in names.into_iter().filter(|name| name.owner == *hash) {
            if let Some(file) = self.disk.open(&name.format()).map_err(io_at("open a record"))? {
                self.disk.claim(&file).map_err(io_at("claim a record"))?;
                claims.push(file);
            }
        }
        Ok(claims)
    }

    /// How full each prefix is, counting records of this boot, and what is `taken` without one.
    pub fn fill(
        &self,
        pod_cidrs: &[IpNet],
        taken: &BTreeSet<IpAddr>,
    ) -> Result<Vec<Fill>, StoreError> {
        let _lock = self.disk.lock().map_err(io_at("lock"))?;
        let records = if self.boot_matches()? { self.names()? } else { Vec::new() };
        Ok(fill(pod_cidrs, &used(&records, taken)))
    }

    /// Removes what a killed writer or another boot left; returns the records that are left.
    fn tidy(&self, notes: &mut Vec<String>) -> Result<Vec<RecordName>, StoreError> {
        self.remove_temporary()?;
        if !self.boot_matches()? {
            let before = self.names()?;
            let mut freed = 0_usize;
            for name in before {
                let text = name.format();
                // Unreadable counts as another boot's: nothing of ours is written to in place.
                let ours =
                    matches!(&self.read_record(name)?.content, Ok(a) if a.boot_id == self.boot_id);
                if !ours {
                    self.disk.remove(&text).map_err(io_at("remove a record of another boot"))?;
                    freed += 1;
                }
            }
            self.replace(BOOT_FILE, self.boot_id.as_bytes())?;
            if freed > 0 {
                notes.push(format!("freed {freed} reservations of an earlier boot"));
            }
        }
        self.names()
    }

    /// Temporary files are written under the lock only, which is ours now: whoever began them is dead.
    fn remove_temporary(&self) -> Result<(), StoreError> {
        let names = self.disk.list().map_err(io_at("list"))?;
        for name in names.iter().filter(|name| name.starts_with(TEMP_PREFIX)) {
            self.disk.remove(name).map_err(io_at("remove a temporary file"))?;
        }
        Ok(())
    }

    fn boot_matches(&self) -> Result<bool, StoreError> {
        let known = self.disk.read(BOOT_FILE).map_err(io_at("read the boot id"))?;
        Ok(known.is_some_and(|known| known == self.boot_id.as_bytes()))
    }

    /// What the owner has already, if it is all it needs and nobody is working on it; else frees it.
    fn own_addresses(
        &self,
        wish: Wish<'_>,
        records: &mut Vec<RecordName>,
    ) -> Result<Option<Vec<IpAddr>>, StoreError> {
        let (own, others): (Vec<_>, Vec<_>) =
            records.drain(..).partition(|record| record.owner == *wish.hash);
        *records = others;
        let mut kept: Option<RecordName> = None;
        for record in own {
            let name = record.format();
            if let Some(file) = self.disk.open(&name).map_err(io_at("open a record"))?
                && !self.disk.try_claim(&file).map_err(io_at("claim a record"))?
            {
                return Err(StoreError::Busy);
            }
            let usable = fits(&record.addresses, wish.pod_cidrs)
                && !record.addresses.iter().any(|address| wish.taken.contains(address));
            if kept.is_none() && usable {
                kept = Some(record);
            } else {
                self.disk.remove(&name).map_err(io_at("remove a record"))?;
            }
        }
        Ok(kept.map(|record| record.addresses))
    }

    /// Looks at up to `most` records behind the cursor and frees those whose pod is gone.
    fn probe(
        &self,
        records: &mut Vec<RecordName>,
        cursor: &mut Cursor,
        most: usize,
        pods: &impl Pods,
        notes: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        records.sort_by(|a, b| a.owner.cmp(&b.owner));
        let start = records.partition_point(|record| record.owner.as_str() <= &*cursor.probed);
        let order: Vec<RecordName> =
            records.iter().cycle().skip(start).take(most.min(records.len())).cloned().collect();
        for name in order {
            name.owner.as_str().clone_into(&mut cursor.probed);
            if self.free_if_gone(&name, pods, notes)? {
                records.retain(|record| *record != name);
            }
        }
        Ok(())
    }

    fn free_if_gone(
        &self,
        name: &RecordName,
        pods: &impl Pods,
        notes: &mut Vec<String>,
    ) -> Result<bool, StoreError> {
        let attachment = match self.read_record(name.clone())?.content {
            Ok(attachment) => attachment,
            Err(reason) => {
                notes.push(format!("record {} is kept but unreadable: {reason}", name.format()));
                return Ok(false);
            }
        };
        if !pods.is_gone(&attachment) {
            return Ok(false);
        }
        let text = name.format();
        let Some(file) = self.disk.open(&text).map_err(io_at("open a record"))? else {
            return Ok(true);
        };
        // Claimed: its ADD is still under way.
        if !self.disk.try_claim(&file).map_err(io_at("claim a record"))? {
            return Ok(false);
        }
        if let Err(error) = pods.clean(&attachment) {
            notes.push(format!("leftover of {} stays: {error:#}", attachment.container_id));
            return Ok(false);
        }
        self.disk.remove(&text).map_err(io_at("remove a leftover"))?;
        notes.push(format!(
            "freed {} of {}, whose pod is gone",
            list(&attachment.addresses),
            attachment.container_id
        ));
        Ok(true)
    }

    fn names(&self) -> Result<Vec<RecordName>, StoreError> {
        let names = self.disk.list().map_err(io_at("list"))?;
        Ok(names.iter().filter_map(|name| RecordName::parse(name)).collect())
    }

    fn read_record(&self, name: RecordName) -> Result<Record, StoreError> {
        let bytes = self.disk.read(&name.format()).map_err(io_at("read a record"))?;
        let content = match bytes {
            None => Err("it is gone".to_owned()),
            Some(bytes) => serde_json::from_slice::<Attachment>(&bytes)
                .map_err(|error| error.to_string())
                .and_then(|found| match found.version {
                    ATTACHMENT_VERSION => Ok(found),
                    other => Err(format!("it has version {other}, not {ATTACHMENT_VERSION}")),
                }),
        };
        Ok(Record { name, content })
    }

    fn write_record(
        &self,
        name: &RecordName,
        attachment: &Attachment,
    ) -> Result<D::File, StoreError> {
        let name = name.format();
        let temp = format!("{TEMP_PREFIX}{name}");
        let bytes = json_line(attachment);
        let file = self.disk.write_new(&temp, &bytes).map_err(io_at("write a record"))?;
        // Claimed before it has its name: nobody ever sees it without its claim.
        if !self.disk.try_claim(&file).map_err(io_at("claim a record"))? {
            return Err(StoreError::Busy);
        }
        self.disk.rename(&temp, &name).map_err(io_at("name a record"))?;
        Ok(file)
    }

    /// After a failed write; what cannot be removed either is a leftover like a killed ADD's.
    fn take_back(&self, name: &RecordName, record_too: bool) {
        let name = name.format();
        let _ = self.disk.remove(&format!("{TEMP_PREFIX}{name}"));
        if record_too {
            let _ = self.disk.remove(&name);
        }
    }

    /// Without the cursor the choice begins at the front: it is worth no error.
    fn read_cursor(&self) -> Cursor {
        let bytes = self.disk.read(CURSOR_FILE).ok().flatten().unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn write_cursor(&self, cursor: &Cursor) -> Result<(), StoreError> {
        let mut bytes = json_line(cursor);
        bytes.resize(bytes.len().max(CURSOR_BYTES), b'\n');
        self.disk.overwrite(CURSOR_FILE, &bytes).map_err(io_at("write state"))
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let temp = format!("{TEMP_PREFIX}{name}");
        let done = self.disk.write_new(&temp, bytes).and_then(|_| self.disk.rename(&temp, name));
        if done.is_err() {
            let _ = self.disk.remove(&temp);
        }
        done.map_err(io_at("write state"))
    }
}

/// Families a node gives addresses of.
fn families(pod_cidrs: &[IpNet]) -> impl Iterator<Item = (&'static str, Vec<IpNet>)> {
    [("IPv4", true), ("IPv6", false)].into_iter().filter_map(|(name, v4)| {
        let of_family: Vec<IpNet> =
            pod_cidrs.iter().copied().filter(|prefix| prefix.addr().is_ipv4() == v4).collect();
        (!of_family.is_empty()).then_some((name, of_family))
    })
}

fn choose_all(
    wish: Wish<'_>,
    records: &[RecordName],
    last: &[IpAddr],
) -> Result<Vec<IpAddr>, StoreError> {
    let used = used(records, wish.taken);
    families(wish.pod_cidrs)
        .map(|(family, prefixes)| {
            let v4 = family == "IPv4";
            let last = last.iter().copied().find(|address| address.is_ipv4() == v4);
            choose::next(&prefixes, &used, last)
                .ok_or_else(|| StoreError::Exhausted { family, fills: fill(&prefixes, &used) })
        })
        .collect()
}

/// Whether `addresses` are exactly one usable address of each family.
fn fits(addresses: &[IpAddr], pod_cidrs: &[IpNet]) -> bool {
    let usable_in = |prefixes: &[IpNet]| {
        addresses
            .iter()
            .filter(|address| prefixes.iter().any(|prefix| choose::usable(*prefix, **address)))
            .count()
    };
    families(pod_cidrs).all(|(_, prefixes)| usable_in(&prefixes) == 1)
        && families(pod_cidrs).count() == addresses.len()
}

fn used(records: &[RecordName], taken: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let recorded = records.iter().flat_map(|record| record.addresses.iter());
    recorded.chain(taken).copied().collect()
}

fn fill(prefixes: &[IpNet], used: &BTreeSet<IpAddr>) -> Vec<Fill> {
    prefixes
        .iter()
        .map(|prefix| Fill {
            prefix: *prefix,
            used: choose::used_in(*prefix, used),
            capacity: choose::capacity(*prefix),
        })
        .collect()
}

fn describe(fills: &[Fill]) -> String {
    let texts: Vec<String> = fills
        .iter()
        .map(|fill| {
            format!("{} of {} addresses of {} in use", fill.used, fill.capacity, fill.prefix)
        })
        .collect();
    texts.join(", ")
}

/// JSON with a line end, for whoever looks at the file. Plain data cannot fail to be written.
fn json_line(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn list(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

fn io_at(step: &'static str) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io { step, source }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
