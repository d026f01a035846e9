//! NUMA: which node a core belongs to, and on which node a guest's memory lies.

use std::collections::HashMap;
use std::path::Path;

use ringstone_virtqueue::MemoryTable;
use serde::Deserialize;

/// Pages of a region that are asked for their node.
const SAMPLES: usize = 16;

/// The nodes of a machine, or of one that a test imagines.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Node by core.
    #[serde(default)]
    cores: HashMap<usize, u32>,
    /// Imagined: node by the guest address at which a region begins.
    #[serde(default)]
    memory: Option<HashMap<u64, u32>>,
}

impl Topology {
    /// What the kernel says of this machine. Empty where it says nothing: then every node is as good as another.
    pub fn of_this_machine() -> Self {
        Self::read(Path::new("/sys/devices/system/node"))
    }

    fn read(nodes: &Path) -> Self {
        let mut cores = HashMap::new();
        for entry in std::fs::read_dir(nodes).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let node = name.to_str().and_then(|name| name.strip_prefix("node")).and_then(|n| n.parse().ok());
            let Some(node) = node else { continue };
            let list = std::fs::read_to_string(entry.path().join("cpulist")).unwrap_or_default();
            cores.extend(list_of(&list).into_iter().map(|core| (core, node)));
        }
        Self { cores, memory: None }
    }

    /// A machine that there need not be: node by core, and node by a region's first guest address.
    pub fn imagined(cores: HashMap<usize, u32>, memory: HashMap<u64, u32>) -> Self {
        Self { cores, memory: Some(memory) }
    }

    /// Whether nodes matter here.
    pub fn several(&self) -> bool {
        let mut nodes = self.cores.values();
        nodes.next().is_some_and(|first| nodes.any(|node| node != first))
    }

    pub fn node_of_core(&self, core: usize) -> Option<u32> {
        self.cores.get(&core).copied()
    }

    /// The node that holds most of a guest's memory, as far as it has any yet.
    pub fn node_of_memory(&self, memory: &MemoryTable) -> Option<u32> {
        if !self.several() {
            return None;
        }
        let mut bytes: HashMap<u32, u64> = HashMap::new();
        for region in memory.regions() {
            match &self.memory {
                Some(imagined) => {
                    if let Some(node) = imagined.get(&region.guest) {
                        *bytes.entry(*node).or_default() += region.len;
                    }
                }
                None => {
                    for node in region.mapping.nodes(SAMPLES).into_iter().flatten() {
                        *bytes.entry(node).or_default() += region.len / SAMPLES as u64;
                    }
                }
            }
        }
        bytes.into_iter().max_by_key(|(node, bytes)| (*bytes, u32::MAX - node)).map(|(node, _)| node)
    }
}

/// The numbers of a list such as `0-3,8`.
fn list_of(text: &str) -> Vec<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_read_as_the_kernel_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        for (node, list) in [("node0", "0-1,4\n"), ("node1", "2-3\n"), ("possible", "0-1\n")] {
            let path = dir.path().join(node);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("cpulist"), list).unwrap();
        }
        let topology = Topology::read(dir.path());
        assert_eq!((topology.node_of_core(4), topology.node_of_core(3)), (Some(0), Some(1)));
        assert_eq!(topology.node_of_core(9), None);
        assert!(topology.several());
        assert!(!Topology::read(Path::new("/nowhere")).several());
    }
}
