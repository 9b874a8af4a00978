//! How many gateways there are, and which part of a limit is this one's while they cannot ask the store.
//!
//! A limit is dealt out like cards: one call each in the order of ranks, until all are dealt. So the parts sum to the limit
//! however many gateways there are. A gateway that is not sure of its rank goes without the last round.

use arrayvec::ArrayVec;

/// A gateway is believed to be gone when that many counts in a row did not show it.
const REMEMBERED: usize = 3;

/// Gateways, as one of them sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Crowd {
    /// How many there are; at least one.
    pub gateways: u32,
    /// How many come before this one, where that is sure.
    pub rank: Option<u32>,
}

impl Crowd {
    /// This gateway's part of a limit. The parts of all gateways sum to the limit.
    pub(super) fn share(self, limit: u32) -> u32 {
        let gateways = self.gateways.max(1);
        let last_round = limit % gateways;
        limit / gateways + u32::from(self.rank.is_some_and(|rank| rank < last_round))
    }

    /// This gateway's part of what was left of a limit. Gateways may have been told different things, so none has the
    /// last round.
    pub(super) fn part(self, left: u32) -> u32 {
        left / self.gateways.max(1)
    }

    /// The same, with others that were not known of.
    pub(super) fn joined_by(self, seen: Self) -> Self {
        if seen.gateways > self.gateways { Self { gateways: seen.gateways, rank: None } } else { self }
    }
}

/// The last counts.
#[derive(Debug)]
pub(super) struct Members {
    configured: u32,
    seen: ArrayVec<Crowd, REMEMBERED>,
}

impl Members {
    pub(super) fn new(configured: Option<u32>) -> Self {
        Self { configured: configured.unwrap_or(1), seen: ArrayVec::new() }
    }

    /// Takes down a count.
    pub(super) fn saw(&mut self, crowd: Crowd) {
        if self.seen.is_full() {
            self.seen.remove(0);
        }
        self.seen.push(crowd);
    }

    /// What they amount to: rather too many gateways than too few, since others may not have learned yet who is gone.
    pub(super) fn crowd(&self) -> Crowd {
        let most = self.seen.iter().map(|crowd| crowd.gateways).max().unwrap_or(0);
        let last = self.seen.last();
        // Whoever is surely gone has left his rank to the next; while that is not sure, two could believe to have it.
        let rank = last.filter(|last| last.gateways == most).and_then(|last| last.rank);
        Crowd { gateways: most.max(self.configured).max(1), rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_sum_to_the_limit() {
        for limit in 0..40 {
            for gateways in 1..12 {
                let parts = (0..gateways).map(|rank| Crowd { gateways, rank: Some(rank) }.share(limit));
                assert_eq!(parts.sum::<u32>(), limit);
                assert!(gateways * Crowd { gateways, rank: None }.share(limit) <= limit);
            }
        }
    }

    /// Whoever has not learned yet that another is gone has no more than he will have.
    #[test]
    fn the_parts_do_not_exceed_the_limit_while_some_have_not_learned_who_is_gone() {
        for limit in 0..40 {
            for gateways in 2..8 {
                for gone in 0..gateways {
                    for learned in 0_u32..1 << gateways {
                        let part = |rank: u32| {
                            let new_rank = rank - u32::from(rank > gone);
                            match learned & (1 << rank) {
                                0 => Crowd { gateways, rank: Some(rank) }.share(limit),
                                _ => Crowd { gateways: gateways - 1, rank: Some(new_rank) }.share(limit),
                            }
                        };
                        let sum: u32 = (0..gateways).filter(|rank| *rank != gone).map(part).sum();
                        assert!(sum <= limit, "{sum} of {limit}");
                    }
                }
            }
        }
    }

    #[test]
    fn who_is_gone_is_counted_for_a_while_and_who_came_at_once() {
        let mut members = Members::new(None);
        let of = |gateways| Crowd { gateways, rank: Some(0) };
        members.saw(of(4));
        assert_eq!(members.crowd(), of(4));
        members.saw(of(3));
        assert_eq!(members.crowd(), Crowd { gateways: 4, rank: None });
        members.saw(of(3));
        members.saw(of(3));
        assert_eq!(members.crowd(), of(3));
        members.saw(of(5));
        assert_eq!(members.crowd(), of(5));
    }

    #[test]
    fn what_is_configured_holds_unless_there_are_more() {
        let mut members = Members::new(Some(4));
        assert_eq!(members.crowd(), Crowd { gateways: 4, rank: None });
        members.saw(Crowd { gateways: 2, rank: Some(1) });
        assert_eq!(members.crowd(), Crowd { gateways: 4, rank: Some(1) });
        members.saw(Crowd { gateways: 6, rank: Some(1) });
        assert_eq!(members.crowd().gateways, 6);
    }
}
