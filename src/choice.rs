//! Choices: an enum and, beside each variant, the name it goes by in a params file and on the command line.

/// Defines such an enum. A default is marked as in std: `#[derive(Default)]` before the name, `#[default]` before the
/// variant.
macro_rules! choice {
    ($(#[$attribute:meta])* $name:ident { $($(#[$variant_attribute:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_attribute])* $variant,)+ }

        impl $name {
            /// The allowed names, in order.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name it goes by.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }

            /// The choice of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some($name::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

pub(crate) use choice;
