//! The pattern job against a backend that dies and that is wrong on command.

mod backend;

use backend::{Backend, Behaviour, Fault};
use serde_json::Value;

const KINDS: [&str; 6] = ["errors", "lost", "wrong", "torn", "doubled", "stuck"];

fn job(backend: &Backend, more: &str) -> String {
    let socket = backend.socket.display();
    format!(r#"{{"mode":"pattern","socket":"{socket}","queues":2,"depth":8,"block_size":2048,{more}}}"#)
}

/// Few enough for a packed ring: the crate `virtio-driver` counts the descriptors since the last kick in 16 bits, and where
/// overflow is checked, as in tests, it stops when a backend that polls lets them grow.
const SLOW: &str = r#""rate":8000"#;

fn run(backend: &Backend, more: &str) -> Value {
    serde_json::from_str(&ringstone_load::run_json(&job(backend, more)).unwrap()).unwrap()
}

/// The kinds of findings there are.
fn found(report: &Value) -> Vec<&'static str> {
    KINDS.into_iter().filter(|kind| report[kind].as_u64().unwrap() > 0).collect()
}

#[test]
fn nothing_is_lost_when_the_backend_dies_again_and_again() {
    for (packed, more) in
        [(false, r#""threads":2"#), (false, r#""wait":"poll","event_idx":false"#), (true, SLOW)]
    {
        let backend =
            Backend::start(Behaviour { packed, killed_every: 1001, kills: 4, ..Behaviour::default() });
        let report = run(&backend, &format!(r#""seconds":1,"packed":{packed},"reconnect_ms":2,{more}"#));
        assert_eq!(report["findings"], serde_json::json!([]), "packed: {packed}");
        assert_eq!((&report["passed"], &report["inflight_region"]), (&true.into(), &true.into()));
        assert_eq!(report["reconnects"], 4);
        assert_eq!(report["outages"].as_array().unwrap().len(), 4);
        let operations = &report["operations"];
        let count = |kind: &str| operations[kind].as_u64().unwrap();
        assert!(count("read") + count("write") + count("flush") > 4 * 1001);
        assert_eq!(report["blocks_checked"], report["blocks_written"]);
        assert!(report["blocks_checked"].as_u64().unwrap() > 0);
    }
}

#[test]
fn what_a_backend_does_wrong_is_found_and_named() {
    for packed in [false, true] {
        for (fault, kind) in [
            (Fault::CompleteTwice(700), "doubled"),
            (Fault::NoStatus(700), "doubled"),
            (Fault::NeverComplete(700), "stuck"),
            (Fault::LoseWrites(3000), "lost"),
            (Fault::ReadOther(3000), "wrong"),
            (Fault::TearWrites(3000), "torn"),
            (Fault::Fail(3000), "errors"),
        ] {
            if packed && matches!(fault, Fault::NeverComplete(_)) {
                // This backend completes a packed ring in order only.
                continue;
            }
            let backend = Backend::start(Behaviour { packed, fault, ..Behaviour::default() });
            let more = format!(
                r#""seconds":0.6,"packed":{packed},"span_bytes":131072,"stall_seconds":0.5,"threads":2,{SLOW}"#
            );
            let report = run(&backend, &more);
            assert_eq!(found(&report), [kind], "{fault:?}, packed: {packed}: {}", report["findings"]);
            assert_eq!(report["passed"], false);
            assert!((1..=20).contains(&report["findings"].as_array().unwrap().len()));
        }
    }
}

#[test]
fn a_backend_that_stays_away_ends_the_job() {
    let behaviour = Behaviour { killed_every: 500, kills: 1, stays_away: true, ..Behaviour::default() };
    let backend = Backend::start(behaviour);
    let error = ringstone_load::run_json(&job(&backend, r#""seconds":30,"stall_seconds":0.2"#));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("was gone for 0.2") && error.contains("attempts to connect again failed"),
        "{error}"
    );
}

#[test]
fn nobody_reconnects_without_an_inflight_region() {
    let behaviour = Behaviour { killed_every: 500, kills: 1, keeps_inflight: false, ..Behaviour::default() };
    let backend = Backend::start(behaviour);
    let error = ringstone_load::run_json(&job(&backend, r#""seconds":30"#)).unwrap_err().to_string();
    assert!(error.contains("does not offer INFLIGHT_SHMFD"), "{error}");
}

#[test]
fn a_ring_format_that_is_not_offered_is_named() {
    let backend = Backend::start(Behaviour::default());
    let error = ringstone_load::run_json(&job(&backend, r#""packed":true"#)).unwrap_err().to_string();
    assert!(error.contains("does not offer RING_PACKED"), "{error}");
}
