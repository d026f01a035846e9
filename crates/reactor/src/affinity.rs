//! Which cores threads may run on.

use std::io;

/// Bind the calling thread to one core.
pub fn bind(core: usize) -> io::Result<()> {
    if core >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the set is a plain bit mask on our stack; `core` is below its size.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The cores that the calling thread may use and that are not in `cores`; `None` if there is none.
pub fn others(cores: &[usize]) -> Option<libc::cpu_set_t> {
    // SAFETY: sched_getaffinity fills a set of the size given; bits are only touched below CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return None;
        }
        for core in cores.iter().filter(|core| **core < libc::CPU_SETSIZE as usize) {
            libc::CPU_CLR(*core, &mut set);
        }
        (libc::CPU_COUNT(&set) > 0).then_some(set)
    }
}
