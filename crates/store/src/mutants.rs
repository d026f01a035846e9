//! Deliberate errors, each of which the crash model has to find. Only tests have the feature `mutants`; without it none can be.

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    RecordBeforeData,
    ReuseBeforeEpoch,
    ReuseBeforeMark,
    PageOverOnlyCopy,
    NoFlushBeforeSuperblock,
    MarkWithoutFlush,
    SameLayerAfterSnapshot,
    StaleIncarnation,
    NoTombstone,
    MergeCovered,
    ReapBeforeMark,
    DropReplayed,
    DataBeforeIntent,
    IntentInCache,
    ForgetInPlace,
    OpenAsFound,
    OpenReused,
    KeepBegun,
    ScrubUnlocked,
}

#[cfg(feature = "mutants")]
thread_local! {
    static NOW: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Have this thread's stores make this error from here on.
#[cfg(feature = "mutants")]
pub fn set(mutant: Option<Mutant>) {
    NOW.set(mutant);
}

#[cfg(feature = "mutants")]
pub(crate) fn is(mutant: Mutant) -> bool {
    NOW.get() == Some(mutant)
}

#[cfg(not(feature = "mutants"))]
pub(crate) const fn is(_: Mutant) -> bool {
    false
}
