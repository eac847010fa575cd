//! No two modules of a crate use each other in a circle, except where [`EXCEPTIONS`] gives a reason.
//!
//! A module is a file. It uses another one when it names an item of it: by `use`, or by a path in its code. A re-export is
//! followed to the file that defines the item, so that a crate root that only collects items uses nothing. Tests do not
//! count.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{
    Attribute, File, Item, ItemMod, ItemUse, Meta, UseTree,
    visit::{self, Visit},
};

/// The path of a module below the root of its crate, which is the empty path.
type Module = Vec<String>;

/// What one file has.
#[derive(Debug, Default)]
struct Contents {
    /// Names that are defined here.
    items: BTreeSet<String>,
    /// Names that `use` brings in, and their paths as written.
    uses: BTreeMap<String, Vec<String>>,
    /// Paths of `use …::*`.
    globs: Vec<Vec<String>>,
    /// All paths of the code, with those of `use` that are no re-exports.
    paths: BTreeSet<Vec<String>>,
}

/// A crate: its modules.
#[derive(Debug, Default)]
struct Modules(BTreeMap<Module, Contents>);

type Edges = BTreeMap<Module, BTreeSet<Module>>;

impl Modules {
    fn read(root: &Path) -> Self {
        let mut modules = Self::default();
        modules.add_file(&Module::new(), root, root.parent().unwrap());
        modules
    }

    /// Adds the module of a file; `directory` has the files of its children.
    fn add_file(&mut self, module: &Module, file: &Path, directory: &Path) {
        let text = fs::read_to_string(file).unwrap();
        let children = self.add(module.clone(), &text);
        for child in children {
            let mut path = module.clone();
            path.push(child.clone());
            let file = directory.join(format!("{child}.rs"));
            assert!(file.exists(), "{} is absent", file.display());
            self.add_file(&path, &file, &directory.join(child));
        }
    }

    /// Adds a module and returns the names of its children in other files.
    fn add(&mut self, module: Module, text: &str) -> Vec<String> {
        let file: File = syn::parse_file(text).unwrap();
        let mut reader = Reader::default();
        reader.visit_file(&file);
        self.0.insert(module, reader.contents);
        reader.children
    }

    /// The module that defines what a path names, seen from a module. `None` for another crate's item.
    fn target(&self, from: &Module, path: &[String], depth: u8) -> Option<Module> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Module::new(),
            "self" => from.clone(),
            "super" => {
                let mut at = from.clone();
                at.pop();
                while let Some(("super", after)) = rest
                    .split_first()
                    .map(|(word, after)| (word.as_str(), after))
                {
                    at.pop();
                    rest = after;
                }
                at
            }
            _ => {
                rest = path;
                let contents = &self.0[from];
                let is_known = contents.uses.contains_key(first)
                    || contents.items.contains(first)
                    || self.child(from, first).is_some();
                if !is_known {
                    return None;
                }
                from.clone()
            }
        };
        while let Some((name, after)) = rest.split_first() {
            if let Some(child) = self.child(&at, name) {
                at = child;
            } else {
                return self.definer(&at, name, after, depth);
            }
            rest = after;
        }
        Some(at)
    }

    /// The module that defines a name that a module has and that is no module itself.
    fn definer(&self, at: &Module, name: &str, after: &[String], depth: u8) -> Option<Module> {
        let contents = &self.0[at];
        if depth == 0 || contents.items.contains(name) {
            return Some(at.clone());
        }
        if let Some(used) = contents.uses.get(name) {
            let path = [used, after].concat();
            return self.target(at, &path, depth - 1);
        }
        let from_glob = contents.globs.iter().find_map(|glob| {
            let from = self.target(at, glob, depth - 1)?;
            let has = self.0[&from].items.contains(name) || self.0[&from].uses.contains_key(name);
            (from != *at && has).then(|| self.definer(&from, name, after, depth - 1))
        });
        from_glob.unwrap_or_else(|| Some(at.clone()))
    }

    fn child(&self, at: &Module, name: &str) -> Option<Module> {
        let mut child = at.clone();
        child.push(name.to_owned());
        self.0.contains_key(&child).then_some(child)
    }

    fn edges(&self) -> Edges {
        let edges = self.0.iter().map(|(module, contents)| {
            let used = contents
                .paths
                .iter()
                .filter_map(|path| self.target(module, path, 8))
                .filter(|used| used != module);
            (module.clone(), used.collect())
        });
        edges.collect()
    }
}

#[derive(Default)]
struct Reader {
    contents: Contents,
    children: Vec<String>,
    /// Inline modules around the place.
    inline: usize,
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let text = list.tokens.to_string();
            text == "test" || text.contains("test ,") || text.contains(", test")
        }
        Meta::Path(path) => path.is_ident("test"),
        _ => false,
    })
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = match item {
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
            Item::Mod(item) => (&item.attrs, None),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            Item::Impl(item) => (&item.attrs, None),
            Item::Use(item) => (&item.attrs, None),
            _ => return visit::visit_item(self, item),
        };
        if is_test(attributes) {
            return;
        }
        if let Some(name) = name
            && self.inline == 0
        {
            self.contents.items.insert(name.to_string());
        }
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if item.content.is_none() {
            self.children.push(item.ident.to_string());
            return;
        }
        self.contents.items.insert(item.ident.to_string());
        self.inline += 1;
        visit::visit_item_mod(self, item);
        self.inline -= 1;
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let is_reexport = !matches!(item.vis, syn::Visibility::Inherited);
        self.read_use(Vec::new(), &item.tree, is_reexport);
    }

    /// `pub(super)` names no item.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string());
        if self.inline == 0 {
            self.contents.paths.insert(names.collect());
        }
        visit::visit_path(self, path);
    }
}

impl Reader {
    fn read_use(&mut self, mut path: Vec<String>, tree: &UseTree, is_reexport: bool) {
        let mut bind = |name: String, path: Vec<String>| {
            if self.inline == 0 {
                if !is_reexport {
                    self.contents.paths.insert(path.clone());
                }
                self.contents.uses.insert(name, path);
            }
        };
        match tree {
            UseTree::Path(tree) => {
                path.push(tree.ident.to_string());
                self.read_use(path, &tree.tree, is_reexport);
            }
            UseTree::Name(tree) if tree.ident == "self" => {
                let name = path.last().cloned().unwrap_or_default();
                bind(name, path);
            }
            UseTree::Name(tree) => {
                path.push(tree.ident.to_string());
                bind(tree.ident.to_string(), path);
            }
            UseTree::Rename(tree) => {
                if tree.ident != "self" {
                    path.push(tree.ident.to_string());
                }
                bind(tree.rename.to_string(), path);
            }
            UseTree::Glob(_) => {
                if self.inline == 0 {
                    if !is_reexport {
                        self.contents.paths.insert(path.clone());
                    }
                    self.contents.globs.push(path);
                }
            }
            UseTree::Group(tree) => {
                for tree in &tree.items {
                    self.read_use(path.clone(), tree, is_reexport);
                }
            }
        }
    }
}

fn root() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).to_owned()
}

/// The graph of each crate of the product, by the name of its directory.
fn crates() -> BTreeMap<String, Edges> {
    let crates = fs::read_dir(root().join("src")).unwrap().map(|entry| {
        let directory = entry.unwrap().path();
        let name = directory.file_name().unwrap().to_str().unwrap().to_owned();
        (name, Modules::read(&directory.join("src/lib.rs")).edges())
    });
    crates.collect()
}

/// A module that uses another one, where both use each other directly or through others, and why that stays.
type Exception = (&'static str, &'static str, &'static str, &'static str);

const EXCEPTIONS: &[Exception] = &[
    (
        "store",
        "settings",
        "mysql",
        "the check of the settings needs the users that the server's socket usually has; the engine reads the settings",
    ),
    (
        "store",
        "settings",
        "postgres",
        "the check of the settings needs the engine's variables and its socket; the engine reads the settings",
    ),
    (
        "store",
        "settings",
        "sqlite",
        "the check of the settings examines the database file; the engine reads the settings",
    ),
];

fn is_exception(name: &str, from: &Module, to: &Module) -> bool {
    EXCEPTIONS.iter().any(|(of, user, used, _)| {
        *of == name && *user == from.join("::") && *used == to.join("::")
    })
}

/// Whether one module may use another one without counting: a child adds to what its parent has begun, and both are read
/// together.
fn is_ancestor(used: &Module, user: &Module) -> bool {
    user.starts_with(used)
}

/// The modules on the way from one module to another, both included, if there is a way.
fn way(edges: &Edges, from: &Module, to: &Module) -> Option<Vec<Module>> {
    let mut reached = BTreeMap::from([(from.clone(), None)]);
    let mut waiting = vec![from.clone()];
    while let Some(at) = waiting.pop() {
        if at == *to {
            let mut way = vec![at];
            while let Some(Some(before)) = reached.get(&way[way.len() - 1]) {
                way.push(Module::clone(before));
            }
            way.reverse();
            return Some(way);
        }
        for next in edges.get(&at).into_iter().flatten() {
            if !reached.contains_key(next) {
                reached.insert(next.clone(), Some(at.clone()));
                waiting.push(next.clone());
            }
        }
    }
    None
}

/// Every use that closes a circle, with the way back.
fn circles(edges: &Edges, is_permitted: impl Fn(&Module, &Module) -> bool) -> Vec<String> {
    let counted: Edges = edges
        .iter()
        .map(|(user, used)| {
            let counts = |used: &&Module| !is_ancestor(used, user) && !is_permitted(user, used);
            (user.clone(), used.iter().filter(counts).cloned().collect())
        })
        .collect();
    let mut found = Vec::new();
    for (user, used) in &counted {
        for used in used {
            if let Some(way) = way(&counted, used, user) {
                let names: Vec<_> = way.iter().map(|module| module.join("::")).collect();
                found.push(format!("{} -> {}", user.join("::"), names.join(" -> ")));
            }
        }
    }
    found
}

#[test]
fn no_two_modules_use_each_other_in_a_circle() {
    let crates = crates();
    let modules: usize = crates.values().map(Edges::len).sum();
    assert!(modules > 200, "only {modules} modules were read");
    let mut found = Vec::new();
    for (name, edges) in &crates {
        let circles = circles(edges, |user, used| is_exception(name, user, used));
        found.extend(
            circles
                .into_iter()
                .map(|circle| format!("{name}: {circle}")),
        );
    }
    assert!(
        found.is_empty(),
        "move what both need into a module that uses neither:\n{}",
        found.join("\n")
    );
}

#[test]
fn every_exception_is_needed() {
    let crates = crates();
    for exception @ (name, user, used, reason) in EXCEPTIONS {
        let module = |text: &str| -> Module { text.split("::").map(str::to_owned).collect() };
        let (user, used) = (module(user), module(used));
        let edges = &crates[*name];
        assert!(edges[&user].contains(&used), "no such use: {exception:?}");
        assert!(
            way(edges, &used, &user).is_some(),
            "no circle: {exception:?}"
        );
        assert!(reason.len() > 20, "no reason: {exception:?}");
    }
}

/// A crate of these modules, `lib` being the root.
fn planted(files: &[(&str, &str)]) -> Vec<String> {
    let mut modules = Modules::default();
    for (name, text) in files {
        let path = name.split("::").filter(|name| *name != "lib");
        modules.add(path.map(str::to_owned).collect(), text);
    }
    circles(&modules.edges(), |_, _| false)
}

#[test]
fn a_planted_circle_is_found_in_each_form() {
    let root = ("lib", "mod a; mod b; pub use b::B; const C: u8 = 1;");
    for (a, b) in [
        ("use crate::b::B; struct A;", "use crate::a::A; struct B;"),
        (
            "use super::b::B; struct A;",
            "use super::{a::{self}}; struct B;",
        ),
        (
            "use super::b::*; struct A;",
            "fn f() { crate::a::g(); } struct B;",
        ),
        // Through the re-export of the root.
        (
            "use crate::B; struct A;",
            "use crate::a::A as Other; struct B;",
        ),
        (
            "struct A(crate::B);",
            "impl From<super::a::A> for B {} struct B;",
        ),
        (
            "use crate::b::B; struct A;",
            "fn f() { use crate::a::A; } struct B;",
        ),
    ] {
        let found = planted(&[root, ("a", a), ("b", b)]);
        assert_eq!(found, ["a -> b -> a", "b -> a -> b"], "{a} {b}");
    }
    let three = [
        ("lib", "mod a; mod b; mod c;"),
        ("a", "use crate::b::B; struct A;"),
        ("b", "use crate::c::C; struct B;"),
        ("c", "use crate::a::A; struct C;"),
    ];
    assert_eq!(planted(&three)[0], "a -> b -> c -> a");
    let nephew = [
        ("lib", "mod a; mod b;"),
        ("a", "mod child; use child::Child; struct A;"),
        ("a::child", "use crate::b::B; struct Child;"),
        ("b", "use crate::a::A; struct B;"),
    ];
    assert_eq!(planted(&nephew).len(), 3, "{:?}", planted(&nephew));
}

#[test]
fn what_is_no_circle_is_not_found() {
    for (a, b) in [
        ("use crate::b::B; struct A;", "struct B;"),
        // A name of another crate, or of the root.
        (
            "use crate::b::B; struct A;",
            "use tokio::a::A; struct B(crate::C);",
        ),
        // Tests may use everything.
        (
            "use crate::b::B; struct A;",
            "struct B; #[cfg(test)] mod tests { use crate::a::A; }",
        ),
        (
            "use crate::b::B; struct A;",
            "struct B; #[cfg(test)] impl B { fn f() { crate::a::f(); } }",
        ),
        (
            "pub(super) struct A;",
            "use super::a::A; pub(in crate::a) struct B;",
        ),
    ] {
        let root = (
            "lib",
            "mod a; mod b; pub use {a::A, b::B}; const C: u8 = 1;",
        );
        assert_eq!(
            planted(&[root, ("a", a), ("b", b)]),
            Vec::<String>::new(),
            "{a} {b}"
        );
    }
    // A parent and its child.
    let family = [
        ("lib", "mod a;"),
        ("a", "mod child; use child::Child; struct A;"),
        ("a::child", "use super::A; struct Child;"),
    ];
    assert_eq!(planted(&family), Vec::<String>::new());
}
