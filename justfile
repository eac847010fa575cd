# Recipes for the usual commands. Install the runner with `cargo install just`. Each recipe is one command, which you can also
# run without just.

# List the recipes
default:
    @just --list

# Demonstrate the broker with a software token
demo *arguments:
    scripts/demo.sh {{ arguments }}

# Run every check and every test, as CI does
test:
    scripts/test.sh

# Run only the tests whose name contains NAME
one NAME:
    cargo nextest run --workspace -E 'test({{ NAME }})'

# Run the checks that need no token and no database: all checks, or only the checks NAMES
check *names:
    scripts/check.sh {{ names }}

# Format every crate
format:
    cargo fmt --all

# Build and open the documentation of the crates
docs:
    cargo doc --workspace --no-deps --document-private-items --open
