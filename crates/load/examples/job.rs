//! Runs one job from standard input, for work on this crate without the Python module:
//! `echo '{"mode":"load","socket":"/tmp/x.sock"}' | cargo run --release --example job` (argument `limit` for the bare ring).

use std::io::Read;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = String::new();
    std::io::stdin().read_to_string(&mut config)?;
    let run = match std::env::args().nth(1).as_deref() {
        Some("limit") => ringstone_load::limit_json,
        _ => ringstone_load::run_json,
    };
    println!("{}", run(&config)?);
    Ok(())
}
