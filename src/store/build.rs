//! sqlx embeds the migrations at compile time but does not watch their directory.

fn main() {
    println!("cargo:rerun-if-changed=../../migrations");
}
