//! A switch and some hosts with one cable each, in network namespaces without names: they are gone with the last process and
//! descriptor that uses them, however a test ends.

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Tells a member process which namespace is its own.
pub const VARIABLE: &str = "DSM_PEER_NETNS";

/// From now on the calling thread, and what it starts, is in this namespace.
pub fn enter(namespace: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

#[derive(Debug)]
struct Namespace(File);

impl Namespace {
    fn new() -> Result<Namespace, String> {
        // Only a thread that ends at once changes its own.
        let made = thread::spawn(|| {
            // SAFETY: a network namespace has nothing to do with the memory or the open files of this process.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        });
        let made = made.join().map_err(|_| "a thread panicked")?;
        made.map(Namespace).map_err(|e| format!("can't make a network namespace: {e}"))
    }

    /// Where other processes find it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs a command line in it; returns what it printed.
    fn run(&self, line: &str) -> Result<String, String> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).stdin(Stdio::null());
        let output = thread::scope(|scope| {
            let inside = scope.spawn(|| enter(&self.0).and_then(|()| command.output()));
            inside.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        });
        let output = output.map_err(|e| format!("{line}: {e}"))?;
        let error = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() || error.contains("RTNETLINK") {
            return Err(format!("{line}: {}", error.trim()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// What slows a cable down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brake {
    /// `tc netem`: each packet is late, and one comes after the other.
    Netem,
    /// `tc tbf`: a bucket of tokens.
    Bucket,
}

/// The switch is in a namespace of its own, so that a host does not notice what happens there.
#[derive(Debug)]
pub struct Lan {
    switch: Namespace,
    hosts: Vec<Namespace>,
    /// `ss -K` works.
    pub can_reset: bool,
    /// How a cable can be made slow, if at all.
    pub brake: Option<Brake>,
}

impl Lan {
    /// So many hosts; `Err` says why this machine can't have them.
    pub fn new(hosts: u16) -> Result<Lan, String> {
        let switch = Namespace::new()?;
        switch.run("ip link add br0 type bridge")?;
        switch.run("ip link set br0 up")?;
        let mut lan = Lan { switch, hosts: Vec::new(), can_reset: false, brake: None };
        for n in 0..hosts {
            let host = Namespace::new()?;
            lan.switch.run(&format!("ip link add p{n} type veth peer name eth0 netns {}", host.path()))?;
            lan.switch.run(&format!("ip link set p{n} master br0 up"))?;
            host.run(&format!("ip addr add {}/24 dev eth0", Lan::addr(n)))?;
            host.run("ip link set eth0 up")?;
            lan.hosts.push(host);
        }
        // Nobody is connected yet.
        lan.can_reset = lan.reset(0).is_ok();
        lan.brake = [Brake::Netem, Brake::Bucket].into_iter().find(|b| lan.slow(0, *b).is_ok());
        if lan.brake.is_some() {
            lan.fast(0);
        }
        Ok(lan)
    }

    fn addr(n: u16) -> IpAddr {
        let [high, low] = (n + 1).to_be_bytes();
        Ipv4Addr::new(10, 77, high, low).into()
    }

    pub fn addrs(&self) -> Vec<IpAddr> {
        (0u16..).zip(&self.hosts).map(|(n, _)| Lan::addr(n)).collect()
    }

    fn host(&self, n: u16) -> &Namespace {
        &self.hosts[usize::from(n)]
    }

    /// Makes the first member process run on the first host, and so on.
    pub fn launcher(&self) -> impl Fn(SocketAddr) -> Command {
        let next = AtomicUsize::new(0);
        let paths: Vec<String> = self.hosts.iter().map(Namespace::path).collect();
        move |control| {
            let mut command = super::launcher(control);
            command.env(VARIABLE, &paths[next.fetch_add(1, Ordering::Relaxed)]);
            command
        }
    }

    /// The host sees that its cable is out.
    pub fn unplug(&self, n: u16) {
        self.switch.run(&format!("ip link set p{n} down")).unwrap();
    }

    pub fn plug(&self, n: u16) {
        self.switch.run(&format!("ip link set p{n} up")).unwrap();
    }

    /// Nobody sees anything, but nothing arrives: connections are half open.
    pub fn vanish(&self, n: u16) {
        self.switch.run(&format!("ip link set p{n} nomaster")).unwrap();
    }

    pub fn appear(&self, n: u16) {
        self.switch.run(&format!("ip link set p{n} master br0")).unwrap();
    }

    /// Ends all connections of a host, for both sides at once (RST). Returns how many.
    pub fn reset(&self, n: u16) -> Result<usize, String> {
        // The first line is the heading. Listening sockets stay.
        let killed = self.host(n).run("ss -K -t -n state established")?;
        Ok(killed.lines().count().saturating_sub(1))
    }

    /// What the host sends, and what is sent to it, takes its time.
    pub fn slow(&self, n: u16, brake: Brake) -> Result<(), String> {
        let how = match brake {
            Brake::Netem => "netem delay 3ms 1ms rate 20mbit",
            Brake::Bucket => "tbf rate 20mbit burst 8k latency 30ms",
        };
        self.host(n).run(&format!("tc qdisc replace dev eth0 root {how}"))?;
        self.switch.run(&format!("tc qdisc replace dev p{n} root {how}")).map(|_| ())
    }

    pub fn fast(&self, n: u16) {
        self.host(n).run("tc qdisc del dev eth0 root").unwrap();
        self.switch.run(&format!("tc qdisc del dev p{n} root")).unwrap();
    }
}
