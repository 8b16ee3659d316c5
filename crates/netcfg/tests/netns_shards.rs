//! What several shards rest on: a flow stays on its TUN queue, a datagram finds the socket the filter names.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a helper's panic fails its test

mod common;

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket as StdUdpSocket};
use std::time::Duration;

use common::{Scratch, privileged};
use mesh_types::limits::{TUN_QUEUE_READS, TUN_QUEUES_PER_SHARD};
use netcfg::tun::{Tun, TunOptions, VNET_HEADER_BYTES};
use netcfg::udp::{FilterInstruction, RecvBatch, UdpOptions, UdpSocket};
use netcfg::{addr, link};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const FLOWS: u16 = 32;

/// A device of four queues in a namespace of its own, with 10.9.0.1/24.
fn queues(scratch: &Scratch, open: fn(Tun) -> anyhow::Result<Vec<Tun>>) -> Vec<Tun> {
    scratch.run(|| {
        let queues = open(Tun::open(&TunOptions::new("meshd0"))?)?;
        addr::add_with_route(queues[0].index(), "10.9.0.1/24".parse()?)?;
        link::set_up(queues[0].index())?;
        Ok(queues)
    })
}

/// Sends a datagram of each flow and tells on which queue it came out.
fn queue_of_each(queues: &mut [Tun], flows: &[StdUdpSocket]) -> Vec<usize> {
    let mut buffer = vec![0; 2_048];
    let mut found = Vec::new();
    for flow in flows {
        flow.send_to(b"x", ("10.9.0.2", 4_000)).expect("send");
        let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
        loop {
            let mut fds: Vec<_> = queues.iter().map(|q| PollFd::new(q, PollFlags::IN)).collect();
            assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "the datagram came out nowhere");
            let ready = fds.iter().position(|fd| !fd.revents().is_empty()).unwrap();
            let len = queues[ready].read(&mut buffer).expect("read");
            let packet = &buffer[VNET_HEADER_BYTES..len];
            // The kernel may say something of its own; ours is UDP.
            if packet[9] == 17 {
                found.push(ready);
                break;
            }
        }
    }
    found
}

/// The answer of each flow, written to queue `to`; false where one did not arrive.
fn answer_each(queues: &[Tun], flows: &[StdUdpSocket], to: usize) -> bool {
    flows.iter().all(|flow| {
        let port = flow.local_addr().unwrap().port();
        let mut packet =
            vec![0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
        let sum: u32 = packet.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(4_000_u16.to_be_bytes());
        packet.extend(port.to_be_bytes());
        packet.extend([0, 9, 0, 0, b'y']);
        let header = [0; VNET_HEADER_BYTES];
        queues[to].write(&[IoSlice::new(&header), IoSlice::new(&packet)]).expect("write");
        flow.recv(&mut [0; 8]).is_ok()
    })
}

fn flows(scratch: &Scratch) -> Vec<StdUdpSocket> {
    let open = |number| {
        let socket = scratch.run(|| Ok(StdUdpSocket::bind(("10.9.0.1", 5_000 + number))?));
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    (0..FLOWS).map(open).collect()
}

#[test]
fn a_flow_stays_on_its_queue_whatever_is_written_to_any() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let mut queues = queues(&scratch, |tun| tun.spread(4, 1));
    let flows = flows(&scratch);
    let before = queue_of_each(&mut queues, &flows);
    assert!((0..4).all(|queue| before.contains(&queue)), "all queues are used: {before:?}");
    for to in 0..4 {
        assert!(answer_each(&queues, &flows, to), "what is written to queue {to} arrives");
        assert_eq!(queue_of_each(&mut queues, &flows), before, "written to {to}");
    }
    assert_eq!(link_queues(&scratch), Some(4), "writers are no queues that are read");
    scratch.run(|| netcfg::tun::remove("meshd0"));
    let gone = queues[1].write(&[IoSlice::new(&[0; 40])]).expect_err("gone");
    assert_eq!(gone.raw_os_error(), Some(77), "EBADFD: {gone}");
}

/// Why [`Tun::spread`] is as it is: the kernel moves a flow to where its other direction is written. Should that end one
/// day, writers of their own can go.
#[test]
fn without_a_writer_of_its_own_the_kernel_moves_a_flow() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let mut queues = queues(&scratch, |tun| {
        let others = [tun.open_queue()?, tun.open_queue()?, tun.open_queue()?];
        Ok(std::iter::once(tun).chain(others).collect())
    });
    let flows = flows(&scratch);
    assert!(queue_of_each(&mut queues, &flows).iter().any(|queue| *queue != 2));
    assert!(answer_each(&queues, &flows, 2));
    assert!(queue_of_each(&mut queues, &flows).iter().all(|queue| *queue == 2));
}

/// The source ports of what waits, in the order it is read.
fn read_ports(tun: &mut Tun, reads: usize) -> Vec<u16> {
    let mut buffer = vec![0; 2_048];
    let mut ports = Vec::new();
    for _ in 0..reads {
        let Ok(len) = tun.read(&mut buffer) else { break };
        let packet = &buffer[VNET_HEADER_BYTES..len];
        if packet[9] == 17 {
            ports.push(u16::from_be_bytes([packet[20], packet[21]]));
        }
    }
    ports
}

#[test]
fn a_sparse_flow_does_not_wait_behind_what_a_bulk_flow_has_queued() {
    if !privileged() {
        return;
    }
    const BULK: usize = 300;
    let scratch = Scratch::new();
    let mut queues = queues(&scratch, |tun| tun.spread(1, TUN_QUEUES_PER_SHARD));
    let mut tun = queues.pop().expect("one reader");
    assert_eq!((queues.len(), tun.queues().count()), (0, TUN_QUEUES_PER_SHARD));
    let flows = flows(&scratch);
    let (bulk, sparse) = flows.split_first().expect("flows");
    for _ in 0..BULK {
        bulk.send_to(b"bulk", ("10.9.0.2", 4_000)).expect("send");
    }
    for flow in sparse {
        flow.send_to(b"sparse", ("10.9.0.2", 4_000)).expect("send");
    }
    // A round gives the bulk flow so many and every other queue all it has.
    let first = read_ports(&mut tun, TUN_QUEUE_READS + sparse.len() + 8);
    let early = first.iter().filter(|port| **port != 5_000).count();
    // Some of 31 share the bulk flow's queue, on average four.
    assert!(early >= sparse.len() / 2, "{early} of {} came before the bulk's end", sparse.len());
    let rest = read_ports(&mut tun, 2 * BULK);
    assert_eq!(first.len() + rest.len(), BULK + sparse.len(), "nothing is left in any queue");
    assert_eq!(tun.read(&mut [0; 64]).expect_err("empty").kind(), std::io::ErrorKind::WouldBlock);
    // What was not said to be ready is not looked at, but then once more.
    bulk.send_to(b"late", ("10.9.0.2", 4_000)).expect("send");
    tun.set_ready(0);
    assert!(read_ports(&mut tun, 1).is_empty());
    assert_eq!(read_ports(&mut tun, 1), [5_000]);
}

#[test]
fn a_device_with_a_single_queue_serves_a_single_reader() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let tun = scratch.run(|| Tun::open(&TunOptions::transient("wg0")));
    let readers = scratch.run(|| tun.spread(1, TUN_QUEUES_PER_SHARD));
    assert_eq!(readers.iter().map(|tun| tun.queues().count()).collect::<Vec<_>>(), [1]);
}

fn link_queues(scratch: &Scratch) -> Option<u32> {
    scratch.run(|| Ok(link::get("meshd0")?.and_then(|link| link.tun).and_then(|tun| tun.queues)))
}

#[test]
fn a_transient_device_has_many_queues_when_asked_and_none_is_left() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let many = TunOptions { multi_queue: true, ..TunOptions::transient("meshd0") };
    for _ in 0..2 {
        let first = scratch.run(|| Tun::open(&many));
        assert!(first.is_multi_queue());
        let second = scratch.run(|| first.try_clone()?.spread(2, 1));
        assert_eq!(link_queues(&scratch), Some(2));
        drop(second);
        assert_eq!(link_queues(&scratch), Some(1), "those of a data plane that was stopped");
        // Another program may not have a queue of ours.
        let refused = scratch.run(|| Ok(Tun::open(&many).map(drop).expect_err("held")));
        assert!(format!("{refused:#}").contains("held by another program"), "{refused:#}");
        drop(first);
        assert_eq!(link_queues(&scratch), None, "it ended with its owner");
    }
    // One that somebody made with a single queue is taken as it is.
    scratch.sh("ip tuntap add dev meshd0 mode tun");
    assert!(!scratch.run(|| Tun::open(&many)).is_multi_queue());
}

/// By the byte at 1, modulo four; anything without one goes to the first.
const BY_SECOND_BYTE: [FilterInstruction; 3] = [
    FilterInstruction(0x30, 0, 0, 1),
    FilterInstruction(0x94, 0, 0, 4),
    FilterInstruction(0x16, 0, 0, 0),
];

/// The socket of the group that a datagram comes to.
fn comes_to(group: &mut [UdpSocket]) -> usize {
    let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
    let mut fds: Vec<_> = group.iter().map(|s| PollFd::new(s, PollFlags::IN)).collect();
    assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "it came to none");
    let ready = fds.iter().position(|fd| !fd.revents().is_empty()).unwrap();
    assert_eq!(group[ready].recv(&mut RecvBatch::new(4)).expect("receive"), 1);
    ready
}

#[test]
fn datagrams_come_to_the_socket_the_filter_names_in_both_families_and_on_every_port() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let open = || UdpSocket::open_group(&UdpOptions::default(), 4, &BY_SECOND_BYTE);
    // A group opened while another is there, as when the port is changed, and the first's sockets go one by one.
    let mut groups = [scratch.run(open), scratch.run(open)];
    assert_ne!(groups[0][0].local_port(), groups[1][0].local_port());
    for group in &mut groups {
        for (address, bind) in [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0")] {
            let to = SocketAddr::new(address.parse().unwrap(), group[0].local_port());
            for number in 0..64 {
                // Another source each time: by addresses alone they would come anywhere.
                let sender = scratch.run(|| Ok(StdUdpSocket::bind(bind)?));
                sender.send_to(&[0, number], to).expect("send");
                assert_eq!(comes_to(group), usize::from(number) % 4, "{to}");
            }
            let sender = scratch.run(|| Ok(StdUdpSocket::bind(bind)?));
            sender.send_to(&[7], to).expect("send");
            assert_eq!(comes_to(group), 0, "too short for the filter");
        }
    }
    let port = groups[1][0].local_port();
    let taken = UdpOptions { port, ..UdpOptions::default() };
    let refused = scratch.run(|| {
        let group = UdpSocket::open_group(&taken, 2, &BY_SECOND_BYTE).map(drop);
        Ok([group, UdpSocket::open(&taken).map(drop)])
    });
    for refused in refused {
        let text = format!("{:#}", refused.expect_err("ours"));
        assert!(text.contains("taken by another program"), "{text}");
    }
}

#[test]
fn a_group_without_a_filter_takes_everything_all_the_same() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let mut group = scratch.run(|| UdpSocket::open_group(&UdpOptions::default(), 3, &[]));
    let to = SocketAddr::from(([127, 0, 0, 1], group[0].local_port()));
    let mut seen = [0; 3];
    for _ in 0..64 {
        let sender = scratch.run(|| Ok(StdUdpSocket::bind("127.0.0.1:0")?));
        sender.send_to(&[1, 2], to).expect("send");
        seen[comes_to(&mut group)] += 1;
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn a_queue_is_opened_of_the_same_device_though_another_has_its_name() {
    if !privileged() {
        return;
    }
    let scratch = Scratch::new();
    let tun = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    scratch.run(|| Ok(link::rename(tun.index(), "elsewhere")?));
    let other = scratch.run(|| Tun::open(&TunOptions::new("meshd0")));
    let queue = scratch.run(|| tun.open_queue());
    assert_eq!((queue.name(), queue.index()), ("elsewhere", tun.index()));
    let queues = |name: &'static str| {
        scratch
            .run(move || Ok(link::get(name)?.and_then(|link| link.tun).and_then(|tun| tun.queues)))
    };
    assert_eq!((queues("elsewhere"), queues("meshd0")), (Some(2), Some(1)));
    scratch.run(|| Ok(link::delete(tun.index())?));
    let refused = scratch.run(|| Ok(tun.open_queue().map(drop).expect_err("gone")));
    assert!(format!("{refused:#}").contains("is gone"), "{refused:#}");
    assert_eq!(queues("meshd0"), Some(1));
    drop(other);
}
