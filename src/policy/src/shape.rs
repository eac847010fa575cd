//! Limits the nesting depth and the number of operators of a policy text before the text is parsed.
//!
//! Cedar's parser and validator, and the code that clones or drops their results, use recursion
//! without a limit. A file with very deep nesting would exhaust the stack and end the process, even
//! in a reload. With these limits, a file with deep nesting is reported as an ordinary problem.

/// Deepest nesting of brackets.
const DEPTH_MAX: usize = 32;
/// Largest number of operator characters in one policy. Each operator character may add a level to
/// the syntax tree.
const OPERATORS_MAX: usize = 1_000;
/// One `if` counts as this number of operator characters, because it adds several levels to the
/// syntax tree.
const IF_WEIGHT: usize = 4;

/// Returns the first problem of a policy text, with its byte offset.
pub(super) fn problem(text: &str) -> Option<(usize, String)> {
    let mut shape = Shape::default();
    let mut rest = text.char_indices().peekable();
    while let Some((offset, c)) = rest.next() {
        match c {
            '"' => {
                while let Some((_, inner)) = rest.next() {
                    match inner {
                        '\\' => drop(rest.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            '/' if rest.peek().is_some_and(|(_, next)| *next == '/') => {
                for (_, inner) in rest.by_ref() {
                    if inner == '\n' {
                        break;
                    }
                }
            }
            'i' if is_word_if(text, offset) => shape.operators += IF_WEIGHT,
            _ => shape.take(c),
        }
        if shape.depth > DEPTH_MAX {
            return Some((
                offset,
                format!("brackets are nested more than {DEPTH_MAX} levels deep"),
            ));
        }
        if shape.operators > OPERATORS_MAX {
            let what = format!(
                "the policy has more than {OPERATORS_MAX} operator characters; split it into two policies"
            );
            return Some((offset, what));
        }
    }
    None
}

#[derive(Default)]
struct Shape {
    depth: usize,
    operators: usize,
}

impl Shape {
    fn take(&mut self, c: char) {
        match c {
            '[' => {
                // `[` also counts as an operator, because `a["b"]["c"]` nests like a chain of
                // operators.
                self.depth += 1;
                self.operators += 1;
            }
            '(' | '{' => self.depth += 1,
            ')' | ']' | '}' => self.depth = self.depth.saturating_sub(1),
            '&' | '|' | '+' | '-' | '*' | '.' | '!' | '<' | '>' | '=' => self.operators += 1,
            // After an unclosed bracket, a semicolon does not end the policy. The parser reports
            // the unclosed bracket later.
            ';' if self.depth == 0 => self.operators = 0,
            _ => {}
        }
    }
}

fn is_word_if(text: &str, offset: usize) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (before, here) = text.split_at(offset);
    here.strip_prefix("if")
        .is_some_and(|rest| !rest.starts_with(is_word) && !before.ends_with(is_word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_and_chains_are_counted_where_they_count() {
        let nested = |depth: usize| "(".repeat(depth) + &")".repeat(depth);
        assert_eq!(problem(&nested(DEPTH_MAX)), None);
        assert_eq!(problem(&nested(DEPTH_MAX + 1)).unwrap().0, DEPTH_MAX);
        let chain = |length: usize| "a&&".repeat(length / 2);
        assert_eq!(problem(&chain(OPERATORS_MAX)), None);
        assert!(problem(&chain(OPERATORS_MAX + 2)).is_some());
        assert!(problem(&"if a then ".repeat(1 + OPERATORS_MAX / IF_WEIGHT)).is_some());
        // Strings and comments are not counted, and each policy is counted separately.
        for quiet in [
            format!("\"{}\\\"{}\"", nested(40).replace(')', ""), "(".repeat(40)),
            format!("// {}\n", "(".repeat(40)),
            format!("{};", chain(OPERATORS_MAX)).repeat(3),
            "iffy ".repeat(OPERATORS_MAX),
        ] {
            assert_eq!(problem(&quiet), None, "{quiet}");
        }
    }
}
