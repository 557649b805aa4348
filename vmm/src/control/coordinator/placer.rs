//! Carries out what the placement policy decides: looks once a second, moves one vCPU at a time, in the same way as
//! `spanvm vcpu migrate` does, and writes each decision down with its figures.

use crate::control::ops::place::{INTERVAL, MOVE};
use crate::control::ops::{OpError, Turn, moves, pause};
use crate::control::shared::Shared;
use crate::control::view::VmStatus;
use migration::placement::Policy;
use migration::placement::planner::Round;
use serde_json::json;
use std::sync::{Arc, Weak};

/// Does so as long as the VM is there.
pub(super) async fn drive(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(shared) = shared.upgrade() else { return };
        if shared.ops().placement().policy() == Policy::Static {
            continue;
        }
        match shared.info().status {
            VmStatus::Ending => return,
            VmStatus::Running if shared.ops().under_way().is_none() => look(&shared).await,
            // Whatever is done to the VM, what is counted meanwhile says nothing.
            _ => shared.ops().placement().disturbed(),
        }
    }
}

async fn look(shared: &Arc<Shared>) {
    let info = shared.fresh_info().await;
    let (round, policy, generation) = {
        let mut placement = shared.ops().placement();
        // It may have been changed meanwhile.
        if placement.policy() == Policy::Static || shared.ops().under_way().is_some() {
            return placement.disturbed();
        }
        (placement.look(&info), placement.policy(), placement.generation())
    };
    if let Some(j) = &round.judged {
        let paid = if j.paid { "paid" } else { "did not pay: not there again for long" };
        let text = format!(
            "the move of vCPU {} to member {} {paid}: {:.3} of {:.3} gained",
            j.vcpu, j.to, j.seen, j.expected
        );
        shared.events().note("judgement", text, j);
    }
    if round.decision().is_some() {
        carry_out(shared, &round, policy, generation).await;
    }
}

async fn carry_out(shared: &Arc<Shared>, round: &Round, policy: Policy, generation: u64) {
    let Some(decision) = round.decision() else { return };
    let Ok(turn) = Turn::take(shared, MOVE) else {
        return shared.ops().placement().disturbed();
    };
    if shared.ops().placement().generation() != generation {
        return;
    }
    let fault = round.fault_s.map_or(String::new(), |s| format!(", {:.0} us per fault", s * 1e6));
    let text = format!(
        "{policy}: vCPU {} from member {} to {}: gains {:.3} (its own {:.3}), costs {:.1} ms{fault}; all wait {:.3}",
        decision.vcpu,
        decision.from,
        decision.to,
        decision.gain,
        decision.own,
        decision.cost_s * 1e3,
        round.waits
    );
    shared.events().note("decision", text, &json!({ "policy": policy, "round": round }));
    let result = moves::migrate(&turn, &[decision.vcpu], decision.to, pause::LIMIT).await;
    shared.events().told("move", &result);
    if let Err(OpError::Refused(why) | OpError::NotFound(why)) = &result {
        shared.events().note("move", format!("refused: {why}"), &());
    }
    let mut placement = shared.ops().placement();
    match result {
        _ if placement.generation() != generation => {}
        Ok(report) => {
            let downtime = report.moves.first().map(|moved| moved.downtime_us / 1e6);
            placement.moved(round, downtime);
        }
        Err(_) => placement.refused(round),
    }
}
