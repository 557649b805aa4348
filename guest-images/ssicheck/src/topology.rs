//! Which CPUs there are and on which NUMA node (= member) each one is.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys;

/// A CPU of the guest and the NUMA node it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Linux CPU number.
    pub id: usize,
    /// Linux NUMA node; spanvm makes one node per member.
    pub node: usize,
}

/// The CPUs that the checks use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// All CPUs under test, neighbours on different nodes wherever possible. Never empty.
    pub cpus: Vec<Cpu>,
    /// One CPU of each node, at least two entries: on a single-node machine two CPUs of that node,
    /// on a single-CPU machine that CPU twice.
    pub spread: Vec<Cpu>,
    /// Nodes among `cpus`.
    pub nodes: usize,
}

/// Why there is no topology to test.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// A file under /sys that can't be read or understood.
    #[error("{path}: {why} (is /sys mounted?)")]
    Sysfs {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// `--cpus` names a CPU that is not there or not ours to use.
    #[error("CPU {0} is not online or not allowed to this process")]
    NoSuchCpu(usize),
    /// `--min-nodes` asks for more than there is.
    #[error("the CPUs are on {found} NUMA node(s), {wanted} wanted")]
    TooFewNodes {
        /// Nodes found.
        found: usize,
        /// Nodes wanted.
        wanted: usize,
    },
    /// Nothing to run on.
    #[error("no usable CPU")]
    NoCpu,
}

/// Parses a kernel CPU list such as `0-2,5`. `None` if it is malformed or names CPUs above 65535.
pub fn parse_cpulist(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last): (usize, usize) = match part.split_once('-') {
            Some((a, b)) => (a.parse().ok()?, b.parse().ok()?),
            None => (part.parse().ok()?, part.parse().ok()?),
        };
        if first > last || last > 65535 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

impl Topology {
    /// Reads /sys; `wanted` (from `--cpus`) restricts and orders the CPUs.
    pub fn discover(wanted: Option<&[usize]>, min_nodes: usize) -> Result<Topology, TopologyError> {
        let allowed = sys::cpu::affinity(0).map_err(|_| TopologyError::NoCpu)?;
        let mut node_of = BTreeMap::new();
        for (node, list) in read_nodes(Path::new("/sys/devices/system/node"))? {
            node_of.extend(list.into_iter().map(|cpu| (cpu, node)));
        }
        let usable = |id: usize| allowed.contains(&id);
        let with_node = |id: usize| Cpu { id, node: node_of.get(&id).copied().unwrap_or(0) };
        let topology = match wanted {
            Some(ids) => {
                if let Some(&missing) = ids.iter().find(|&&id| !usable(id)) {
                    return Err(TopologyError::NoSuchCpu(missing));
                }
                Topology::from_order(ids.iter().map(|&id| with_node(id)).collect())
            }
            None => Topology::from_order(interleave(allowed.iter().map(|&id| with_node(id)).collect())),
        }?;
        if topology.nodes < min_nodes {
            return Err(TopologyError::TooFewNodes { found: topology.nodes, wanted: min_nodes });
        }
        Ok(topology)
    }

    /// A topology from CPUs already in the wanted order.
    fn from_order(cpus: Vec<Cpu>) -> Result<Topology, TopologyError> {
        let first = *cpus.first().ok_or(TopologyError::NoCpu)?;
        let mut spread: Vec<Cpu> = Vec::new();
        for cpu in &cpus {
            if spread.iter().all(|s| s.node != cpu.node) {
                spread.push(*cpu);
            }
        }
        let nodes = spread.len();
        if nodes == 1 {
            spread.push(cpus.get(1).copied().unwrap_or(first));
        }
        Ok(Topology { cpus, spread, nodes })
    }

    /// The pairs (a, b) of neighbouring nodes: each node is once the first and once the second of a pair,
    /// but two nodes make one pair each way.
    pub fn pairs(&self) -> Vec<(Cpu, Cpu)> {
        let n = self.spread.len();
        (0..n).filter_map(|i| Some((*self.spread.get(i)?, *self.spread.get((i + 1) % n)?))).collect()
    }

    /// The pairs of neighbouring nodes for checks that go both ways by themselves: two nodes make one pair.
    pub fn links(&self) -> Vec<(Cpu, Cpu)> {
        let mut pairs = self.pairs();
        if self.spread.len() == 2 {
            pairs.truncate(1);
        }
        pairs
    }

    /// The CPU for the `i`-th of several threads: neighbours get different nodes.
    pub fn cpu_for(&self, i: usize) -> Cpu {
        let fallback = Cpu { id: 0, node: 0 };
        self.cpus.get(i % self.cpus.len().max(1)).copied().unwrap_or(fallback)
    }
}

/// Orders CPUs so that neighbours are on different nodes: first of each node, second of each node, ...
fn interleave(cpus: Vec<Cpu>) -> Vec<Cpu> {
    let mut rank_in_node: BTreeMap<usize, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, Cpu)> = cpus
        .into_iter()
        .map(|cpu| {
            let rank = rank_in_node.entry(cpu.node).or_insert(0);
            *rank += 1;
            (*rank, cpu)
        })
        .collect();
    ranked.sort_by_key(|(rank, cpu)| (*rank, cpu.node));
    ranked.into_iter().map(|(_, cpu)| cpu).collect()
}

/// The CPUs of every node under `dir`; a kernel without NUMA has no such folder and one node.
fn read_nodes(dir: &Path) -> Result<BTreeMap<usize, Vec<usize>>, TopologyError> {
    let mut nodes = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return Ok(nodes) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("node")).and_then(|n| n.parse().ok());
        let Some(number) = number else { continue };
        let path = entry.path().join("cpulist");
        let problem = |why: String| TopologyError::Sysfs { path: path.display().to_string(), why };
        let text = fs::read_to_string(&path).map_err(|e| problem(e.to_string()))?;
        let cpus = parse_cpulist(&text).ok_or_else(|| problem(format!("not a CPU list: {text:?}")))?;
        nodes.insert(number, cpus);
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpulists() {
        assert_eq!(parse_cpulist("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_cpulist(""), Some(vec![]));
        for bad in ["2-1", "a", "1-", "0-99999999999"] {
            assert_eq!(parse_cpulist(bad), None, "{bad}");
        }
    }

    fn cpu(id: usize, node: usize) -> Cpu {
        Cpu { id, node }
    }

    #[test]
    fn neighbours_are_on_different_nodes() {
        let order = interleave(vec![cpu(0, 0), cpu(1, 0), cpu(2, 1), cpu(3, 2)]);
        assert_eq!(order, vec![cpu(0, 0), cpu(2, 1), cpu(3, 2), cpu(1, 0)]);
        let topology = Topology::from_order(order).expect("four CPUs");
        assert_eq!(topology.spread, vec![cpu(0, 0), cpu(2, 1), cpu(3, 2)]);
        assert_eq!(topology.pairs().len(), 3);
    }

    #[test]
    fn one_node_still_gives_a_pair() {
        let two = Topology::from_order(vec![cpu(0, 0), cpu(1, 0)]).expect("two CPUs");
        assert_eq!((two.nodes, two.spread), (1, vec![cpu(0, 0), cpu(1, 0)]));
        let one = Topology::from_order(vec![cpu(0, 0)]).expect("one CPU");
        assert_eq!(one.spread, vec![cpu(0, 0), cpu(0, 0)]);
    }
}
