// What the dashboard's JSON must be, by Grafana's own types; tests/deploy/test_dashboard.py lets tsc check it.
import type { Dashboard, FieldConfigSource, Panel, RowPanel } from '@grafana/schema';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as lines from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

type PartialDeep<T> = T extends (infer U)[] ? PartialDeep<U>[] : T extends object ? { [K in keyof T]?: PartialDeep<T[K]> } : T;

// JSON has the text of an enum's members, not the members.
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;

// Panel leaves the options to each kind of panel; Grafana fills in those left out.
type Kind<Name extends string, Options, Field> = Omit<Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: Name;
  options: PartialDeep<Options>;
  fieldConfig?: FieldConfigSource<PartialDeep<Field>>;
  targets: PrometheusQuery[];
};

// Of the Prometheus data source, which the package has no types of.
interface PrometheusQuery {
  datasource: { type: 'prometheus'; uid: string };
  expr: string;
  legendFormat: string;
  refId: string;
  format: 'time_series' | 'table' | 'heatmap';
  instant: boolean;
  range: boolean;
  exemplar?: boolean;
}

type Known =
  | Kind<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | Kind<'stat', stat.Options, unknown>
  | Kind<'timeseries', lines.Options, lines.FieldConfig>
  | RowPanel;

export type Board = Plain<Omit<Dashboard, 'panels'> & { panels: Known[] }>;
