//! Unit tests of the report. The bench itself has no harness, so they are a test target of their own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

#[path = "report/mod.rs"]
mod report;

mod targets {
    use crate::report::{TargetOutcome, Threshold, short_version, stats::Estimate, with_section};

    #[test]
    fn a_target_is_met_or_missed_only_by_the_whole_interval() {
        let estimate = |low, value, high| Estimate { value, low, high };
        for (target, estimate, outcome) in [
            (Threshold::AtMost(1.1), estimate(1.0, 1.05, 1.1), TargetOutcome::Met),
            (Threshold::AtMost(1.1), estimate(1.0, 1.05, 1.11), TargetOutcome::Undecided),
            (Threshold::AtMost(1.1), estimate(1.11, 1.2, 1.3), TargetOutcome::NotMet),
            (Threshold::AtLeast(0.98), estimate(0.98, 1.0, 1.1), TargetOutcome::Met),
            (Threshold::AtLeast(0.98), estimate(0.97, 1.0, 1.1), TargetOutcome::Undecided),
            (Threshold::AtLeast(0.98), estimate(0.9, 0.95, 0.97), TargetOutcome::NotMet),
            (Threshold::None, estimate(0.0, 1.0, 9.0), TargetOutcome::NoTarget),
            (Threshold::AtMost(0.0), Estimate::exact(0.0), TargetOutcome::Met),
            (Threshold::AtMost(0.0), Estimate::exact(1.0), TargetOutcome::NotMet),
        ] {
            assert_eq!(target.compare(estimate), outcome, "{target:?} {estimate:?}");
        }
    }

    #[test]
    fn only_the_section_between_the_markers_is_replaced() {
        let text = "a\n<!-- cost:begin -->\nold\n<!-- cost:end -->\nb\n";
        assert_eq!(
            with_section(text, "new\n").as_deref(),
            Some("a\n<!-- cost:begin -->\nnew\n<!-- cost:end -->\nb\n")
        );
        assert_eq!(with_section("a\n", "new\n"), None);
        assert_eq!(short_version("6.18.44-local"), "6.18.44");
    }
}

mod stats {
    use crate::report::stats::{Estimate, Random, of, of_ratios, quantile};

    #[test]
    fn quantiles_are_interpolated() {
        for (values, share, expected) in [
            (&[][..], 0.5, None),
            (&[7.0], 0.99, Some(7.0)),
            (&[3.0, 1.0, 2.0], 0.5, Some(2.0)),
            (&[4.0, 1.0, 2.0, 3.0], 0.5, Some(2.5)),
            (&[0.0, 10.0], 0.25, Some(2.5)),
            (&[1.0, 2.0, 3.0], 1.0, Some(3.0)),
        ] {
            assert_eq!(quantile(values, share), expected, "{values:?} at {share}");
        }
    }

    #[test]
    fn more_numbers_give_a_narrower_interval_around_the_median() {
        let numbers = |count: usize| -> Vec<f64> { (0..count).map(|n| (n * 7_919 % 1_000) as f64).collect() };
        let mut widths = Vec::new();
        for count in [10, 100, 1_000] {
            let estimate = of(&numbers(count)).unwrap();
            assert!(estimate.low <= estimate.value && estimate.value <= estimate.high, "{estimate:?}");
            widths.push(estimate.high - estimate.low);
        }
        assert!(widths[0] > widths[1] && widths[1] > widths[2], "{widths:?}");
        assert_eq!(of(&[5.0; 20]), Some(Estimate::exact(5.0)));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn a_change_of_both_values_of_a_pair_cancels_out() {
        let below: Vec<f64> = (1..50).map(f64::from).collect();
        let above: Vec<f64> = below.iter().map(|value| value * 1.5).collect();
        let ratio = of_ratios(&above, &below).unwrap();
        assert!((ratio.value - 1.5).abs() < 1e-9 && ratio.high - ratio.low < 1e-9, "{ratio:?}");
    }

    #[test]
    fn every_number_is_drawn() {
        let mut random = Random(0x5e1f_c022);
        let mut drawn = [0_u32; 7];
        for _ in 0..7_000 {
            drawn[random.below(7)] += 1;
        }
        assert!(drawn.iter().all(|count| (800..1_200).contains(count)), "{drawn:?}");
    }
}

mod rows {
    use crate::report::{Samples, TargetOutcome, rows_of};

    /// The outcome of the row about what is lost and not counted.
    fn uncounted(flood: &str, values: &[(&str, f64)]) -> TargetOutcome {
        let mut samples = Samples::default();
        for (name, value) in values {
            samples.add(&format!("flood.{flood}.{name}"), *value);
        }
        let rows = rows_of(&samples, None);
        rows.iter().find(|row| row.what.ends_with("lost and not counted")).unwrap().outcome
    }

    #[test]
    fn a_loss_that_is_not_counted_is_found() {
        for (made, established, lost, lines, written, sum_error, outcome) in [
            (100.0, 100.0, 0.0, 202.0, 202.0, 0.0, TargetOutcome::Met),
            (100.0, 90.0, 10.0, 182.0, 182.0, 0.0, TargetOutcome::Met),
            (100.0, 90.0, 9.0, 182.0, 182.0, 0.0, TargetOutcome::NotMet),
            // One was invented; a line is missing; a sum is wrong.
            (100.0, 101.0, 0.0, 204.0, 204.0, 0.0, TargetOutcome::NotMet),
            (100.0, 100.0, 0.0, 201.0, 202.0, 0.0, TargetOutcome::NotMet),
            (100.0, 100.0, 0.0, 202.0, 202.0, 1.0, TargetOutcome::NotMet),
        ] {
            let values = [
                ("made", made),
                ("established", established),
                ("lost", lost),
                ("lines", lines),
                ("written", written),
                ("wrong", 0.0),
                ("sum_error", sum_error),
            ];
            assert_eq!(uncounted("two", &values), outcome, "{values:?}");
        }
    }

    #[test]
    fn refused_connects_are_counted_and_make_no_connection() {
        for (refused, established, outcome) in [
            (100.0, 0.0, TargetOutcome::Met),
            (99.0, 0.0, TargetOutcome::NotMet),
            (100.0, 1.0, TargetOutcome::NotMet),
        ] {
            let values = [
                ("made", 100.0),
                ("refused", refused),
                ("established", established),
                ("lost", 0.0),
                ("lines", 2.0),
                ("written", 2.0),
                ("sum_error", 0.0),
            ];
            assert_eq!(
                uncounted("refused", &values),
                outcome,
                "{refused} counted, {established} established"
            );
        }
    }

    #[test]
    fn a_skipped_row_has_the_reason() {
        let mut samples = Samples::default();
        for name in ["churn.close.ours", "churn.close.empty", "churn.ours", "churn.none", "churn.empty"] {
            samples.values.insert(name.to_owned(), vec![1.0, 1.0]);
        }
        samples.skipped.insert("churn.bpftrace".to_owned(), "no tracefs".to_owned());
        let rows = rows_of(&samples, None);
        let row = rows.iter().find(|row| row.what.starts_with("bpftrace")).unwrap();
        assert_eq!((row.outcome, row.why.as_deref()), (TargetOutcome::Skipped, Some("no tracefs")));
    }

    #[test]
    fn a_guard_that_cannot_be_attached_is_a_skipped_row_with_the_reason() {
        let mut samples = Samples::default();
        assert!(rows_of(&samples, None).is_empty());
        samples.skipped.insert("guard.packet".to_owned(), "no sch_ingress".to_owned());
        let rows = rows_of(&samples, None);
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!((rows[0].group, rows[0].outcome), ("guard", TargetOutcome::Skipped));
        assert_eq!(rows[0].why.as_deref(), Some("no sch_ingress"));
    }

    #[test]
    fn only_ratios_are_taken_from_a_virtual_machine() {
        let mut vm = Samples::default();
        for name in ["transition.ours.perf", "transition.empty.perf"] {
            vm.add(name, 50.0);
        }
        vm.facts.insert("kernel".to_owned(), "6.12.1".to_owned());
        let rows = rows_of(&Samples::default(), Some(&vm));
        let whats: Vec<_> = rows.iter().map(|row| row.what.as_str()).collect();
        assert_eq!(
            whats,
            [
                "on 6.12.1, emulated: transition: perf: a transition between two addresses, to an empty program"
            ]
        );
    }
}

mod table {
    use crate::report::{CostRow, CostUnit, Samples, TargetOutcome, Threshold, markdown, stats::Estimate};

    #[test]
    fn each_row_has_the_measurement_and_the_outcome() {
        let row = CostRow {
            group: "churn",
            what: "selfconn, to empty programs".to_owned(),
            unit: CostUnit::Ratio,
            target: Threshold::AtLeast(0.98),
            estimate: Some(Estimate { value: 0.991, low: 0.984, high: 1.002 }),
            outcome: TargetOutcome::Met,
            why: None,
        };
        let skipped = CostRow { estimate: None, outcome: TargetOutcome::Skipped, ..row.clone() };
        let text = markdown("a machine", &Samples::default(), &[row, skipped]);
        assert!(text.contains("| 0.991 × [0.984, 1.002] | ≥ 0.980 × | met     |"), "{text}");
        assert!(text.contains("| skipped |"), "{text}");
        let lines: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.chars().count()).collect();
        assert!(lines.iter().all(|length| *length == lines[0]), "{text}");
    }
}

mod chart {
    use crate::report::{CostRow, CostUnit, TargetOutcome, Threshold, stats::Estimate, svg};

    #[test]
    fn the_length_of_a_bar_is_its_share() {
        let row = |group, what: &str, value| CostRow {
            group,
            what: what.to_owned(),
            unit: CostUnit::Ratio,
            target: Threshold::None,
            estimate: Some(Estimate::exact(value)),
            outcome: TargetOutcome::NoTarget,
            why: None,
        };
        let chart = svg(&[
            row("churn", "selfconn, to untraced", 1.0),
            row("churn", "tcpstates, to untraced", 0.25),
            row("churn", "other", 9.0),
            row("bind", "selfconn, to untraced", 0.5),
        ]);
        for width in ["420.0", "105.0", "210.0"] {
            assert!(chart.contains(&format!("width=\"{width}\"")), "{width}: {chart}");
        }
        assert_eq!(chart.matches("<rect").count(), 3);
        let (connections, binds) =
            (chart.find(">127.0.0.1 to 127.0.0.2").unwrap(), chart.find(">calls of bind()").unwrap());
        assert!(connections < binds, "{chart}");
    }
}
