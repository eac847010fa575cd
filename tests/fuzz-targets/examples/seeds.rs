//! Writes the good inputs of a target into a directory, one a file: `seeds TARGET DIRECTORY`.

use std::{env, error::Error, fs, path::PathBuf};

use keybroker_fuzz_targets::TARGETS;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(name), Some(directory)) = (arguments.next(), arguments.next().map(PathBuf::from))
    else {
        return Err("usage: seeds TARGET DIRECTORY".into());
    };
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.ok_or("there is no such target")?;
    for (number, input) in (target.seeds)().iter().enumerate() {
        fs::write(directory.join(format!("good-{number}")), input)?;
    }
    Ok(())
}
