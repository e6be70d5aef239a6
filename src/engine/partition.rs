//! How the two stages share a GPU's multiprocessors (SMs): from percentages to counts. Pure arithmetic over what the
//! driver says it can give; `cuda/lane.rs` makes it true.

use std::fmt;

use crate::choice::choice;

choice! {
    /// How the two stages share the multiprocessors.
    Backend {
        /// `mps` if the device says MPS is on, else `green`, else `shared`.
        Auto = "auto",
        /// Two driver contexts with an SM count each, under the MPS daemon.
        Mps = "mps",
        /// Two green contexts.
        Green = "green",
        /// Two streams, the decoder's with the higher priority.
        Shared = "shared",
    }
}

/// MPS grants SMs in twos (measured on an H100).
const MPS_STEP: usize = 2;

/// What a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// How.
    pub backend: Backend,
    /// Share of the encoder, 1 to 100 %.
    pub encoder: u8,
    /// Share of the decoder, 1 to 100 %.
    pub decoder: u8,
}

/// Sizes of the groups that green contexts can be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granularity {
    /// SMs of the smallest group.
    pub least: usize,
    /// A group's SMs are a multiple of this.
    pub step: usize,
    /// Smallest groups that the chip can be cut into at once.
    pub groups: usize,
}

/// What a device can give this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// SMs that work of this process may use.
    pub sms: usize,
    /// SMs of the chip: more, where the process was started with a limit (`CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`).
    pub chip: usize,
    /// Whether an MPS daemon serves this process.
    pub mps: bool,
    /// Green contexts, or why there are none.
    pub green: Result<Granularity, String>,
    /// SMs that the decoder needs at once: its blocks work in clusters.
    pub least_decoder: usize,
    /// Whether its blocks wait for one another, so that nothing else may take their SMs.
    pub decoder_waits: bool,
}

/// How a grant is made true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Each stage uses everything, one after the other.
    Whole,
    /// Two contexts with an SM count.
    Mps,
    /// Two green contexts.
    Green,
    /// Two prioritised streams.
    Shared,
}

/// SMs of each stage. Equal grants are the same partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grant {
    /// How.
    pub kind: Kind,
    /// SMs of the encoder.
    pub encoder: usize,
    /// SMs of the decoder.
    pub decoder: usize,
}

/// A grant and why it is this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What each stage gets.
    pub grant: Grant,
    /// One clause for people and diagnostics.
    pub reason: String,
}

/// A split that cannot be had, and what could.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub(super) String);

impl Kind {
    /// As users name it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Whole => "whole",
            Kind::Mps => Backend::Mps.name(),
            Kind::Green => Backend::Green.name(),
            Kind::Shared => Backend::Shared.name(),
        }
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Whole => write!(f, "no partition, each stage in turn on all {} SMs", self.encoder),
            Kind::Shared => write!(f, "shared: both stages on all {} SMs, the decoder first", self.encoder),
            Kind::Mps | Kind::Green => {
                write!(f, "{}: encoder {} SMs, decoder {} SMs", self.kind.name(), self.encoder, self.decoder)
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.grant, self.reason)
    }
}

impl Grant {
    /// Everything for each stage.
    pub fn whole(sms: usize) -> Self {
        Self { kind: Kind::Whole, encoder: sms, decoder: sms }
    }
}

impl Offer {
    /// Everything for each stage, one after the other.
    pub fn whole(&self) -> Decision {
        Decision { grant: Grant::whole(self.sms), reason: self.limited("the stages take turns".into()) }
    }

    /// SMs of each stage for what was asked, or why that cannot be had and what could.
    pub fn decide(&self, split: Split) -> Result<Decision, Refusal> {
        let (backend, reason) = self.choose(split.backend)?;
        let grant = match backend {
            Backend::Mps => self.mps(split)?,
            Backend::Green => self.green(split)?,
            Backend::Auto | Backend::Shared => Grant { kind: Kind::Shared, encoder: self.sms, decoder: self.sms },
        };
        Ok(Decision { grant, reason: self.limited(reason) })
    }

    /// The backend to use (never `auto`), and why.
    fn choose(&self, asked: Backend) -> Result<(Backend, String), Refusal> {
        let refuse = |why: String| Err(Refusal(why));
        match (asked, self.mps, &self.green) {
            (Backend::Auto, true, _) => Ok((Backend::Mps, "auto: an MPS daemon serves this process".into())),
            (Backend::Auto, false, Ok(_)) => Ok((Backend::Green, "auto: no MPS daemon serves this process".into())),
            (Backend::Auto, false, Err(why)) => {
                Ok((Backend::Shared, format!("auto: no MPS daemon serves this process, and {why}")))
            }
            (Backend::Mps, false, green) => {
                let other = if green.is_ok() { "green" } else { "shared" };
                refuse(format!(
                    "partition 'mps' needs an MPS daemon, and none serves this process: start the node with \
                     mps:=true (or run nvidia-cuda-mps-control -d before it), or use partition '{other}'"
                ))
            }
            (Backend::Green, _, Err(why)) => {
                refuse(format!("partition 'green' cannot be had: {why}; use partition 'shared'"))
            }
            _ => Ok((asked, "asked for".into())),
        }
    }

    /// `reason`, and the limit that the process was started with, if there is one.
    fn limited(&self, reason: String) -> String {
        if self.sms < self.chip {
            format!("{reason}; CUDA_MPS_ACTIVE_THREAD_PERCENTAGE leaves {} of {} SMs", self.sms, self.chip)
        } else {
            reason
        }
    }

    /// SMs of a percentage, not rounded.
    fn share(&self, percent: u8) -> f64 {
        self.sms as f64 * f64::from(percent) / 100.0
    }

    /// MPS rounds up; so that both together are no more than there is, the decoder gets what the encoder leaves.
    fn mps(&self, split: Split) -> Result<Grant, Refusal> {
        if self.decoder_waits && u32::from(split.encoder) + u32::from(split.decoder) > 100 {
            return Err(self.more_than_all(split, "under this decoder, whose blocks wait for one another,"));
        }
        let up = |percent| ((self.share(percent).ceil() as usize).next_multiple_of(MPS_STEP)).min(self.sms);
        let shares = |encoder: u8, decoder: u8| {
            let both = u32::from(encoder) + u32::from(decoder);
            let (mut encoder, mut decoder) = (up(encoder), up(decoder));
            if both <= 100 {
                encoder = encoder.min(self.sms.saturating_sub(MPS_STEP));
                let left = self.sms - encoder;
                decoder = if both == 100 { left } else { decoder.min(left) };
            }
            (encoder, decoder)
        };
        let (encoder, decoder) = shares(split.encoder, split.decoder);
        if decoder < self.least_decoder {
            let lowest = (1..=99).find(|p| shares(100 - p, *p).1 >= self.least_decoder).unwrap_or(99);
            return Err(Refusal(format!(
                "mps_decoder_percentage {} % is {decoder} SMs, and the decoder needs {} at once: use at least {lowest} % for \
                 the decoder and at most {} % for the encoder",
                split.decoder,
                self.least_decoder,
                100 - lowest
            )));
        }
        Ok(Grant { kind: Kind::Mps, encoder, decoder })
    }

    fn more_than_all(&self, split: Split, of: &str) -> Refusal {
        Refusal(format!(
            "{} % and {} % are more than the GPU has, and shares {of} cannot overlap: use at most {} % for the decoder or \
             {} % for the encoder",
            split.encoder,
            split.decoder,
            100 - split.encoder.min(99),
            100 - split.decoder.min(99)
        ))
    }

    /// The decoder takes a group, since its clusters need the driver's promise that SMs of a group lie together; the
    /// encoder takes the rest, or groups of it.
    fn green(&self, split: Split) -> Result<Grant, Refusal> {
        let Granularity { least, step, groups } = match &self.green {
            Ok(g) => *g,
            Err(why) => return Err(Refusal(why.clone())),
        };
        if u32::from(split.encoder) + u32::from(split.decoder) > 100 {
            return Err(self.more_than_all(split, "of partition 'green'"));
        }
        let most = self.sms.saturating_sub(least) / step * step;
        if most < least {
            return Err(Refusal(format!(
                "partition 'green' needs two groups of {least} SMs, and there are {} SMs: use partition 'shared'",
                self.sms
            )));
        }
        // A group and the rest; where something is left over, both are made of smallest groups.
        let whole_rest = split.encoder + split.decoder == 100;
        let step = if whole_rest { step } else { step.next_multiple_of(least) };
        let nearest = |percent| ((self.share(percent) / step as f64).round() as usize) * step;
        for (stage, percent) in [("encoder", split.encoder), ("decoder", split.decoder)] {
            if nearest(percent) == 0 {
                let lowest = (1..=100).find(|p| nearest(*p) > 0).unwrap_or(100);
                return Err(Refusal(format!(
                    "mps_{stage}_percentage {percent} % is {:.1} SMs, and green contexts come in groups of {step}: use \
                     at least {lowest} %, which gives {least} SMs",
                    self.share(percent)
                )));
            }
        }
        let decoder = nearest(split.decoder).clamp(least, most);
        let left = self.sms - decoder;
        // The rest as a whole need not be a multiple of the step.
        let cut = (groups * least).saturating_sub(decoder) / step * step;
        let encoder = if whole_rest { left } else { nearest(split.encoder).clamp(least, cut.max(least)) };
        Ok(Grant { kind: Kind::Green, encoder: encoder.min(left), decoder })
    }
}

/// An H100 or H200 as its driver describes it.
#[cfg(test)]
pub(crate) fn hopper() -> Offer {
    let green = Ok(Granularity { least: 8, step: 8, groups: 15 });
    Offer { sms: 132, chip: 132, mps: true, green, least_decoder: 1, decoder_waits: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(backend: Backend, encoder: u8, decoder: u8) -> Split {
        Split { backend, encoder, decoder }
    }

    fn sms(offer: &Offer, backend: Backend, encoder: u8, decoder: u8) -> (usize, usize) {
        let d = offer.decide(split(backend, encoder, decoder)).unwrap();
        (d.grant.encoder, d.grant.decoder)
    }

    #[test]
    fn mps_rounds_up_and_the_decoder_gets_the_complement() {
        let o = hopper();
        for (encoder, decoder, expected) in [
            (50, 50, (66, 66)),
            (70, 30, (94, 38)),
            (30, 70, (40, 92)),
            (99, 1, (130, 2)),
            (1, 99, (2, 130)),
            (40, 30, (54, 40)),
            (100, 100, (132, 132)),
            (70, 40, (94, 54)),
        ] {
            assert_eq!(sms(&o, Backend::Mps, encoder, decoder), expected, "{encoder} {decoder}");
        }
    }

    #[test]
    fn green_shares_are_a_group_and_the_rest() {
        let o = hopper();
        for (encoder, decoder, expected) in [
            (50, 50, (68, 64)),
            (70, 30, (92, 40)),
            (66, 34, (84, 48)),
            (30, 70, (36, 96)),
            (96, 4, (124, 8)),
            (4, 96, (12, 120)),
            (40, 30, (56, 40)),
            (60, 39, (72, 48)),
        ] {
            assert_eq!(sms(&o, Backend::Green, encoder, decoder), expected, "{encoder} {decoder}");
        }
    }

    #[test]
    fn no_split_up_to_a_hundred_overlaps_or_leaves_a_stage_without_sms() {
        for chip in [16, 46, 78, 114, 132, 148] {
            let green = Ok(Granularity { least: 8, step: 8, groups: chip / 8 });
            let o = Offer { sms: chip, chip, green, ..hopper() };
            for (encoder, decoder) in (1..=99u8).flat_map(|e| (1..=100 - e).map(move |d| (e, d))) {
                for backend in [Backend::Mps, Backend::Green] {
                    let Ok(d) = o.decide(split(backend, encoder, decoder)) else {
                        assert_eq!(backend, Backend::Green, "{chip} {encoder} {decoder}");
                        continue;
                    };
                    let Grant { encoder: e, decoder: d, .. } = d.grant;
                    assert!(e > 0 && d > 0 && e + d <= chip, "{backend} of {chip}: {encoder} {decoder} gave {e} {d}");
                    assert!(encoder + decoder < 100 || e + d == chip, "{backend}: {e} + {d} leave SMs idle");
                }
            }
        }
    }

    #[test]
    fn anything_less_than_all_is_made_of_smallest_groups() {
        // As CUDA documents compute capability 8: groups of four SMs at least, in steps of two.
        let o = Offer { sms: 128, chip: 128, green: Ok(Granularity { least: 4, step: 2, groups: 32 }), ..hopper() };
        for (encoder, decoder) in (1..=99u8).flat_map(|e| (1..=99 - e).map(move |d| (e, d))) {
            let Ok(d) = o.decide(split(Backend::Green, encoder, decoder)) else { continue };
            let Grant { encoder: e, decoder: d, .. } = d.grant;
            assert!(e % 4 == 0 && d % 4 == 0 && e + d <= 128, "{encoder} {decoder} gave {e} {d}");
        }
        assert_eq!(sms(&o, Backend::Green, 40, 30), (52, 40));
        assert_eq!(sms(&o, Backend::Green, 70, 30), (90, 38), "all of it: a group and the rest");
    }

    #[test]
    fn a_decoder_whose_blocks_wait_for_one_another_has_a_share_of_its_own_that_holds_a_cluster() {
        let o = Offer { least_decoder: 4, decoder_waits: true, ..hopper() };
        for (encoder, decoder) in [(100, 100), (70, 40)] {
            let e = o.decide(split(Backend::Mps, encoder, decoder)).unwrap_err().to_string();
            assert!(e.contains("cannot overlap") && e.contains("wait for one another"), "{e}");
        }
        let e = o.decide(split(Backend::Mps, 99, 1)).unwrap_err().to_string();
        assert!(e.contains("mps_decoder_percentage 1 % is 2 SMs") && e.contains("at least 4 %"), "{e}");
        assert_eq!(sms(&o, Backend::Mps, 96, 4), (128, 4), "what the refusal offers");
    }

    #[test]
    fn refusals_say_what_could_be_had() {
        let refusal = |o: &Offer, s| o.decide(s).unwrap_err().to_string();
        let o = hopper();
        let over = refusal(&o, split(Backend::Green, 70, 40));
        assert!(over.contains("at most 30 % for the decoder or 60 % for the encoder"), "{over}");
        let little = refusal(&o, split(Backend::Green, 97, 3));
        assert!(little.contains("mps_decoder_percentage 3 %") && little.contains("at least 4 %"), "{little}");
        assert_eq!(sms(&o, Backend::Green, 96, 4).1, 8, "what the refusal offers can be had");
        let none = Offer { mps: false, ..hopper() };
        let mps = refusal(&none, split(Backend::Mps, 50, 50));
        assert!(mps.contains("mps:=true") && mps.contains("'green'"), "{mps}");
        let bare = Offer { mps: false, green: Err("the driver is too old".into()), ..hopper() };
        assert!(
            refusal(&bare, split(Backend::Green, 50, 50)).contains("the driver is too old; use partition 'shared'")
        );
        let small = Offer { sms: 14, chip: 14, ..none };
        assert!(refusal(&small, split(Backend::Green, 50, 50)).contains("there are 14 SMs"));
    }

    #[test]
    fn auto_takes_mps_then_green_then_shared_and_says_why() {
        let asked = split(Backend::Auto, 50, 50);
        let kind = |o: &Offer| o.decide(asked).map(|d| (d.grant.kind, d.to_string())).unwrap();
        let (k, text) = kind(&hopper());
        assert_eq!(k, Kind::Mps);
        assert_eq!(text, "mps: encoder 66 SMs, decoder 66 SMs (auto: an MPS daemon serves this process)");
        let no_daemon = Offer { mps: false, ..hopper() };
        let (k, text) = kind(&no_daemon);
        assert_eq!(k, Kind::Green);
        assert!(text.ends_with("(auto: no MPS daemon serves this process)"), "{text}");
        let (k, text) = kind(&Offer { green: Err("this chip has no green contexts".into()), ..no_daemon });
        assert_eq!(k, Kind::Shared);
        assert!(text.contains("this chip has no green contexts"), "{text}");
    }

    #[test]
    fn a_limit_from_outside_is_respected_and_reported() {
        let o = Offer { sms: 66, ..hopper() };
        let d = o.decide(split(Backend::Auto, 70, 30)).unwrap();
        assert_eq!((d.grant.encoder, d.grant.decoder), (48, 18));
        assert!(d.reason.contains("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE leaves 66 of 132 SMs"), "{}", d.reason);
        assert!(o.whole().reason.contains("66 of 132"));
    }
}
